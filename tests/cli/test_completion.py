"""The Tab key, pressed in real shells in a real terminal."""

import shutil
import subprocess
import sys
import sysconfig

import pytest

SHELLS = {
    "bash": ("bash --norc --noprofile", 'eval "$(perqueue completion bash)"'),
    "zsh": ("zsh -f", 'autoload -Uz compinit; compinit -u -D; eval "$(perqueue completion zsh)"'),
    "fish": ("fish --no-config", "perqueue completion fish | source"),
}


class Terminal:
    """A terminal of 80 columns, by tmux."""

    def __init__(self, socket, program, folder, environ):
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        self._environ = {name: str(value) for name, value in environ.items()}
        self._run("new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), program)

    def _run(self, *arguments):
        done = subprocess.run(
            [*self._tmux, *arguments], env=self._environ, check=True, capture_output=True, text=True
        )
        return done.stdout

    def press(self, text, *keys):
        self._run("send-keys", "-l", "--", text)
        if keys:
            self._run("send-keys", *keys)

    def shows(self):
        return self._run("capture-pane", "-p")

    def end(self):
        self._run("kill-server")


@pytest.fixture(params=SHELLS)
def terminal(request, tmp_path, tmp_path_factory, until):
    """A shell in which completion is set up as the page tells, in a folder that holds an outbox."""
    program, setup = SHELLS[request.param]
    for tool in ("tmux", request.param):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    (tmp_path / "activities.db").touch()
    (tmp_path / "xdg").mkdir()
    path = f"{sysconfig.get_path('scripts')}:/usr/bin:/bin"
    environ = {"PATH": path, "HOME": tmp_path, "XDG_DATA_HOME": tmp_path / "xdg", "LANG": "C.UTF-8"}
    socket = tmp_path_factory.mktemp("tmux") / "socket"
    terminal = Terminal(socket, program, tmp_path, environ)
    try:
        terminal.press(f"clear; {setup}; echo se'''t up'", "Enter")
        until(lambda: "\nset up" in "\n" + terminal.shows(), 20)
        terminal.press("clear", "Enter")
        until(lambda: "set up" not in terminal.shows())
        yield terminal
    finally:
        terminal.end()


def test_tab_completes(terminal, until):
    """A command, a subcommand, an option and a path are completed; several candidates are listed."""
    terminal.press("perqueue dra", "Tab")
    until(lambda: "perqueue drain" in terminal.shows())
    terminal.press("--wa", "Tab")
    until(lambda: "perqueue drain --watch" in terminal.shows())
    terminal.press("--outbox act", "Tab")
    until(lambda: "perqueue drain --watch --outbox activities.db" in terminal.shows())
    terminal.press("", "C-u")  # not C-c: a shell may forget what was typed since
    terminal.press("perqueue rejected d", "Tab")
    until(lambda: "perqueue rejected discard" in terminal.shows())
    terminal.press("", "C-u")
    terminal.press("perqueue re", "Tab", "Tab")
    until(lambda: all(name in terminal.shows() for name in ("record", "report", "reconcile", "rejected")))


def test_an_unknown_shell_is_refused(perqueue):
    """Only what click can complete is offered, and the others are named in the error."""
    result = perqueue("completion", "tcsh")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "bash" in result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_it_needs_no_outbox(shell):
    """What a shell's start-up file runs prints a script, and nothing else, whatever is set up."""
    done = subprocess.run(
        [sys.executable, "-m", "perqueue", "completion", shell], capture_output=True, text=True, check=True
    )
    assert "_PERQUEUE_COMPLETE" in done.stdout
    assert done.stderr == ""
