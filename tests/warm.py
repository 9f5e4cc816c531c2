"""A Python that starts at once: forked from a process that has imported what takes seconds, torch above all.

`warm.py SOCKET script.py ...` or `warm.py SOCKET -m module ...` runs like `python` with the same arguments, with this
process's folder, environment and streams; it ends as that ends, and that ends with it. `warm.py --serve SOCKET PID
MODULE...` imports the modules and forks; it ends with the process PID."""

import contextlib
import gc
import json
import os
import signal
import socket
import sys


def ask(address, arguments):
    "Have it run; end as it ended."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(address)
        socket.send_fds(s, [b"!"], [0, 1, 2])
        s.sendall(json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode() + b"\n")
        answer = s.makefile().readline()
    code = os.waitstatus_to_exitcode(int(answer or signal.SIGKILL))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(address, owner, modules):
    "Import the modules; fork for each that asks."
    import importlib

    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or each fork would copy all that its collector looks at
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".part")
        listener.listen(64)
        listener.settimeout(1)
        os.rename(address + ".part", address)
        while is_alive(owner):
            reap()
            try:
                asked, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                watch(asked)
            asked.close()


def reap():
    "Take leave of those that have ended."
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def watch(asked):
    "Fork once more, to know how that one ends, and to end it where nobody waits for it."
    import threading

    asked.setblocking(True)
    _, streams, _, _ = socket.recv_fds(asked, 1, 3)
    order = json.loads(asked.makefile().readline())
    pid = os.fork()
    if pid == 0:
        asked.close()
        run(order, streams)
    for stream in streams:
        os.close(stream)
    ended = threading.Event()

    def end_it():
        with contextlib.suppress(ConnectionError):
            asked.recv(1)  # nothing comes but its end
        if not ended.is_set():  # else the number may be another process's by now
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=end_it, daemon=True).start()
    status = os.waitpid(pid, 0)[1]
    ended.set()
    asked.sendall(b"%d\n" % status)
    os._exit(0)


def run(order, streams):
    "What `python` would do with these arguments."
    import runpy

    arguments, folder, environment = order
    for k, stream in enumerate(streams):
        os.dup2(stream, k)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "matplotlib" in sys.modules and "MPLBACKEND" in environment:
        sys.modules["matplotlib"].rcParams["backend"] = environment["MPLBACKEND"]
    draw_anew()
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    sys.path[0] = folder if is_module else os.path.dirname(os.path.abspath(arguments[0]))
    if is_module:
        leave(lambda: runpy.run_module(arguments[1], run_name="__main__", alter_sys=True))
    leave(lambda: runpy.run_path(arguments[0], run_name="__main__"))


def draw_anew():
    "Random numbers of its own, or each fork would draw those of the first. The seed of hashes is the server's."
    import random

    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def leave(program):
    "Run it and end as Python would, without taking apart all that is imported."
    import atexit
    import threading
    import traceback

    code = 0
    try:
        program()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        ask(sys.argv[1], sys.argv[2:])
