"""Everything that people edit is in settings.ini; this file only hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
s = config["DEFAULT"]

setup(
    version=s["version"],
    description=s["description"],
    author=s["author"],
    license=s["license"],
    keywords=s["keywords"],
    packages=[s["lib_name"]],
    package_data={s["lib_name"]: ["*.html"]},
    install_requires=s["requirements"].split(),
    extras_require={
        extra: s[f"{extra}_requirements"].split()
        for extra in ("cluster", "dicom", "onnx", "pretrained", "external", "dev")
    },
    entry_points={"console_scripts": s["console_scripts"].split()},
)
