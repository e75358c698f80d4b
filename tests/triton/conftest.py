"""Runs each suite of this folder in the kind of process it needs, within one pytest run.

Whether Triton interprets or compiles a kernel is fixed when the kernel's module is imported, for the whole process. So
`interpreted/` needs a process with TRITON_INTERPRET=1, and `compiled/` one without. Tests that need the other kind than
this process are run by a child pytest, and its reports are replayed here as they arrive: the same test ids, options
like -k and -x, and failure texts as if everything ran in one process. To debug one test without the detour:

    TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted -k ... --pdb
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPORT_FD = "FASTEMBED_TEST_REPORT_FD"  # in a child: where its reports go
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_INTERPRETER = {HERE / "interpreted": True, HERE / "compiled": False}

_child = pytest.StashKey["Child"]()


class Child:
    """A pytest process that runs the given tests with the other TRITON_INTERPRET."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        reading, writing = os.pipe()
        environment = {**os.environ, "TRITON_INTERPRET": "0" if INTERPRETED else "1", REPORT_FD: str(writing)}
        profile = config.getoption("--hypothesis-profile", None)
        options = ["-p", "no:cacheprovider", *([f"--hypothesis-profile={profile}"] if profile else [])]
        self.config = config
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the child runs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *(item.nodeid for item in items)],
            cwd=config.rootpath,
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
        )
        os.close(writing)
        self.reports = os.fdopen(reading)

    def reports_of(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of the next test, which the child runs in the order given; a failure if the child died."""
        while line := self.reports.readline():
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            assert report.nodeid == item.nodeid, f"expected a report of {item.nodeid}, got one of {report.nodeid}"
            if isinstance(report.longrepr, list):  # of a skipped test: pytest expects the tuple that JSON lacks
                report.longrepr = tuple(report.longrepr)
            yield report
            if report.when == "teardown":
                return
        self.output.seek(0)
        message = f"the child pytest ended with status {self.process.wait()} before this test's end\n"
        yield pytest.TestReport(
            item.nodeid, item.location, {}, "failed", message + self.output.read(), "call", duration=0
        )


def needs_other_process(item: pytest.Item) -> bool:
    folders = [folder for folder in NEEDS_INTERPRETER if item.path.is_relative_to(folder)]
    return any(NEEDS_INTERPRETER[folder] != INTERPRETED for folder in folders)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not needs_other_process(item):
        return None
    session = item.session
    if _child not in session.stash:
        session.stash[_child] = Child(item.config, [other for other in session.items if needs_other_process(other)])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.stash[_child].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    session._setupstate.teardown_exact(nextitem)  # nothing of this item was set up, but of the folders around it
    return True


class ReportToParent:
    """In a child: sends each report to the parent, a line of JSON each."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self.config = config
        self.stream = os.fdopen(descriptor, "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data, default=str), file=self.stream, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if REPORT_FD in os.environ:
        config.pluginmanager.register(ReportToParent(config, int(os.environ.pop(REPORT_FD))))
    if INTERPRETED:
        import interpreter

        interpreter.install()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _child in session.stash:
        session.stash[_child].process.terminate()
        session.stash[_child].process.wait()
