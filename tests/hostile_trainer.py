"""A trainer that misbehaves in the way that its first argument names. Standard library only."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

BUDGET = 1_000_000


def write(text):
    with open(os.environ["SCALETUNE_RESULTS"], "ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def report(**row):
    write(json.dumps(row) + "\n")


def done(loss=3.0):
    report(tokens=BUDGET, loss=loss)


def fork():
    """True in a child."""
    return os.fork() == 0


def ok():
    report(tokens=BUDGET / 2, loss=4.0, train_loss=4.1)
    report(tokens=BUDGET, loss=3.0, train_loss=3.1, mine="x")


def prints_100_mb():
    block = b"x" * 999 + b"\n"
    for _ in range(1600):
        os.write(1, block * 65)
    done()


def prints_binary():
    os.write(1, bytes(range(256)) * 300)
    sys.exit(3)


def reports_nothing():
    print("I trained well")


def reports_nan():
    report(tokens=10, loss=5.0)
    report(tokens=20, loss=float("nan"))
    time.sleep(60)


def reports_nan_as_c_does():
    write(b'{"tokens": 20, "loss": -nan}\n')
    time.sleep(60)


def reports_inf():
    report(tokens=20, loss="inf")


def reports_1e400():
    write(b'{"tokens": 20, "loss": 1e400}\n')


def reports_a_string():
    report(tokens=BUDGET, loss="three")


def reports_a_list():
    report(tokens=BUDGET, loss=[3.0, 3.1])


def reports_twice_the_same():
    done()
    done()


def reports_twice():
    done(3.0)
    done(3.5)


def reports_tokens_backwards():
    report(tokens=BUDGET, loss=3.0)
    report(tokens=BUDGET / 2, loss=4.0)


def reports_too_many_tokens():
    report(tokens=2 * BUDGET, loss=3.0)


def reports_steps_as_tokens():
    for step in range(1, 101):
        report(tokens=step * 10, loss=5 - step / 50)


def reports_steps():
    for step in range(1, 101):
        report(step=step * 10, loss=5 - step / 50)


def reports_negative_counts():
    report(tokens=BUDGET, loss=3.0, n_params=-1, flops="many")


def hangs_after_its_result():
    done()
    time.sleep(600)


def hangs():
    time.sleep(600)


def leaves_children():
    for _ in range(3):
        if fork():
            time.sleep(600)
            os._exit(0)
    done()


def becomes_a_daemon():
    if fork():
        os.setsid()
        if fork():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    done()


def has_a_slow_helper():
    subprocess.Popen(["sleep", "0.2"])
    done()


def ignores_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(tokens=10, loss=float("nan"))
    while True:
        time.sleep(1)


def ends_before_its_budget():
    report(tokens=BUDGET / 4, loss=4.0)


def fails_after_its_result():
    done()
    sys.exit("cannot upload the model")


def fails():
    report(tokens=BUDGET / 4, loss=4.0)
    print("loading \x1b[31mdata\x1b[0m", flush=True)
    raise RuntimeError("no data with token=hunter2secret")


def segfaults():
    signal.raise_signal(signal.SIGSEGV)


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_guard():
    if fork():
        os.setsid()
        time.sleep(600)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def exits_at_once():
    os._exit(7)


def changes_directory():
    os.chdir("/")
    done()


def deletes_its_folder():
    done()
    time.sleep(0.5)
    shutil.rmtree(os.path.dirname(os.environ["SCALETUNE_RESULTS"]))


def deletes_its_folder_and_diverges():
    report(tokens=20, loss=float("nan"))
    shutil.rmtree(os.path.dirname(os.environ["SCALETUNE_RESULTS"]))
    time.sleep(60)


def writes_garbage():
    write(os.urandom(1000).replace(b"\n", b"") + b"\n[1, 2]\nnull\n" + b"{" * 5000 + b"\n")


def writes_garbage_around_its_result():
    write(b"hello\n")
    done()


def writes_no_line_break():
    write(b'{"tokens": 1000000, "loss": 3.0}')


def writes_half_a_line():
    write(b'{"tokens": 1000000, "lo')


def writes_26_mb():
    block = b"".join(b'{"tokens": %d, "loss": 4.0}\n' % i for i in range(1, 10001))
    for _ in range(2):
        write(block)
    write(b"z" * 25_000_000 + b"\n")
    done()


def writes_its_results_anew():
    path = os.environ["SCALETUNE_RESULTS"]
    rows = ""
    for i in range(1, 11):
        rows += json.dumps({"tokens": i * BUDGET / 10, "loss": 4 - i / 10}) + "\n"
        with open(path + ".new", "w") as file:
            file.write(rows)
        os.replace(path + ".new", path)
        time.sleep(0.05)


def closes_its_output():
    os.close(1)
    os.close(2)
    time.sleep(0.3)
    done()


def asks():
    input("Overwrite? [y/n] ")


def needs_too_much_memory():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
    bytearray(1 << 30)


def prints_out_of_memory():
    print("RuntimeError: CUDA out of memory. Tried to allocate 2 GiB")
    sys.exit(1)


def gets_odd_arguments():
    assert sys.argv[2] == "a 'b' \"c\" $HOME {x} \n" + "y" * 20000, sys.argv[2]
    assert os.environ["ODD"] == "'\"; touch hacked"
    done()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
