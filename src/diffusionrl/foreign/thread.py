"""Code that is not ours, a user's reward above all, runs in one thread of its own: from the import of its module to its last
call, one piece of work after another.

So what belongs to a thread (a connection, a model) works in every call, and no signal and no end of the process comes from it.
"""

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from diffusionrl import devices, interruption

_PATIENCE = 0.05  # seconds between two looks at whether the run was asked to stop


class Job:
    """A piece of work for the thread.

    Attributes:
        over: set when it is done.
        raised: whatever it raised.
        seconds: that it took.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.gpu = devices.current_index()
        self.over = threading.Event()
        self.began: float | None = None
        self.raised: BaseException | None = None
        self.seconds = 0.0

    def start(self) -> "Job":
        """After all work that was given before. Work that comes from the thread itself is done at once."""
        if isinstance(threading.current_thread(), _Thread):
            self.run()
            return self
        with _Now.lock:
            if _Now.thread is None:
                _Now.thread = _Thread()
                _Now.thread.start()
            _Now.thread.jobs.put(self)
        return self

    def run(self) -> None:
        began = self.began = time.perf_counter()
        try:
            devices.use_index(self.gpu)
            self.work()
        except BaseException as error:  # foreign code may even try to end its thread
            self.raised = error
        self.seconds = time.perf_counter() - began
        self.over.set()

    def wait(self, timeout: float) -> bool:
        """Whether it is over at most ``timeout`` seconds after it began. Work that takes longer is left behind with its thread,
        and what comes after it is done in a new one.

        Raises:
            Interrupted: the run was asked to stop.
        """
        while not self.over.wait(_PATIENCE):
            interruption.check()
            slow = _Now.thread.running if _Now.thread is not None else None  # this work, or work that nobody waits for
            if slow is not None and slow.began is not None and time.perf_counter() - slow.began > timeout:
                _leave_behind(slow)
                if slow is self:
                    return self.over.is_set()
        return True


class _Thread(threading.Thread):
    """A daemon: what hangs in it must not keep the process from ending."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="rewards")
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.running: Job | None = None

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            self.running = job
            job.run()
            self.running = None


class _Now:
    """The process's one such thread."""

    thread: _Thread | None = None
    lock = threading.Lock()


def _forget() -> None:
    """A forked child has the memory of the thread, and no thread."""
    _Now.thread, _Now.lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _leave_behind(hanging: Job) -> None:
    """A new thread for the work that waits; the old one ends when what hangs in it is over."""
    with _Now.lock:
        old = _Now.thread
        if old is None or old.running is not hanging:
            return
        _Now.thread = _Thread()
        try:
            while True:
                _Now.thread.jobs.put(old.jobs.get_nowait())
        except Empty:
            old.jobs.put(None)
        _Now.thread.start()


def hold() -> None:
    """The work that this thread is at waits for a person who has asked for time: how long it may take counts from now."""
    thread = threading.current_thread()
    if isinstance(thread, _Thread) and thread.running is not None:
        thread.running.began = time.perf_counter()


def is_left_behind() -> bool:
    """This is a thread that hung, whose work comes too late to be of any consequence."""
    return isinstance(threading.current_thread(), _Thread) and threading.current_thread() is not _Now.thread


def within(timeout: float, work: Callable[[], None]) -> bool:
    """Whether ``work``, done in the thread, is over within ``timeout`` seconds. What it raises is raised here.

    Raises:
        Interrupted: the run was asked to stop.
    """
    job = Job(work).start()
    if not job.wait(timeout):
        return False
    if job.raised is not None:
        raise job.raised
    return True


def anything() -> type[BaseException] | tuple[type[BaseException], ...]:
    """What code that is not ours may raise: in a thread beside the main one, where no signal is noted, whatever there is."""
    return (Exception, SystemExit) if threading.current_thread() is threading.main_thread() else BaseException
