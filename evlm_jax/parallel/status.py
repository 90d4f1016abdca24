"""Exit statuses of the command line, and the error that carries one."""

PREEMPTED, INTERRUPTED = (
    75,
    130,
)  # 75 is sysexits' "try again later", 130 what shells give for Ctrl-C
STATUSES = (
    "Exit status: 0 done; 1 an error, told in one line; 2 wrong arguments; 75 training was stopped"
    " by SIGTERM (a preemption), 130 by Ctrl-C: it was saved, and the same command goes on."
)


class Stopped(InterruptedError):
    """A signal ended a run that can be continued; `status` is the exit status of the process."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status
