"""Kill work at each of its changes of files and directories, in forked children."""

import os
import sys
import traceback

import torch

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def killed_at(step: int, work) -> bool:
    """Do the work in a child that dies before its ``step``th change; False if it had fewer."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # makes the child's pool before its threads race to make it
        left = step

        def change() -> None:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1

        def watch(event: str, args: tuple) -> None:
            if event in _CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                change()

        sync = os.fsync
        os.fsync = lambda file: (change(), sync(file))
        sys.addaudithook(watch)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9
