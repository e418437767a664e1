"""pytest tests/unit/test_entry.py"""

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, time
from selectmoe.entry import ending, enter

def broken():
    raise OSError("no engine")

def body():
    with ending(lambda: print("never", flush=True)):
        pass
    with ending(broken), ending(lambda: print("ended", flush=True)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

enter("name", body)
"""


def test_a_signal_ends_other_work_too_and_what_fails_is_one_line():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "ended\n"
    assert done.stderr == "name: interrupted; the same command goes on from here\nname: not ended: no engine\n"
