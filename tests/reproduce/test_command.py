"""`nrm reproduce`: how experiments are found, refusals, and all of them together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import InputError
from nrm_reproduce import command as commands
from nrm_reproduce import recurrent
from nrm_reproduce.command import ALL, EXPERIMENTS, OF_ALL, find
from nrm_reproduce.report import PAGE, RESULT, Experiment, Report, Row, Table


def test_experiments_are_found_by_name():
    for name in (*EXPERIMENTS, ALL):
        assert find(name).name == name
    with pytest.raises(InputError, match=r"There is: .*mlp-mnist"):
        find("nothing of the kind")
    apart = {"mutag", "tracr", "circuits", "networks"}  # data of their own, or hours
    assert set(EXPERIMENTS) - set(OF_ALL) == apart
    assert find("cnn-clusters").options == {"layers", "weights"}


def test_the_command_imports_no_experiment_and_says_what_is_missing(tmp_path):
    """In a process of its own. Nor does a command of nrm's own import anything of this package."""
    packages = ("networkx", "scipy")
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from nrm.cli.app import app\n"
        "def ours(): return sorted(m for m in sys.modules if m.startswith('nrm_reproduce'))\n"
        "refused = CliRunner().invoke(app, ['explain', 'nowhere.png', '--model', 'a:b'])\n"
        "assert refused.exit_code == 2, refused.output\n"
        "assert ours() == [], ours()\n"
        "shown = CliRunner().invoke(app, ['--help'])\n"
        "assert 'reproduce' in shown.output, shown.output\n"
        "print(ours())\n"
        f"sys.argv = ['nrm', 'reproduce', 'mutag', '--out', {str(tmp_path / 'out')!r}]\n"
        f"for package in {packages}:\n"
        "    ours = ('nrm_reproduce', package)\n"
        "    for name in [n for n in sys.modules if n.partition('.')[0] in ours]:\n"
        "        del sys.modules[name]\n"
        "    sys.modules[package] = None\n"
        "    try:\n"
        "        app(prog_name='nrm')\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 2, ended.code\n"
        "    del sys.modules[package]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['nrm_reproduce', 'nrm_reproduce.command']\n"
    assert done.stderr.splitlines() == [
        f"error: {package} is not installed: pip install 'nrm[reproduce]'" for package in packages
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mlp-mnst", "--data", "digits"), "no experiment is called 'mlp-mnst'. Did you mean"),
        (("mlp-mnist", "--data", "nowhere"), "--data nowhere: no such folder"),
    ],
)
def test_what_is_refused_takes_one_line(command, tmp_path, args, message):
    found = command(*args, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert message in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_json_into_a_folder_is_refused_early(command, tmp_path):
    page = tmp_path / "out" / "report.html"
    found = command("mlp-mnist", "--out", tmp_path / "out", "--json", page)
    assert found.exit_code == 2
    assert "where result.json is written anyway" in found.stderr
    found = command("mlp-mnist", "--data", "digits", "--out", tmp_path / "out", "--json", tmp_path)
    assert found.exit_code == 2
    assert "is a folder, not a file" in found.output


def little(name, error=None):
    """An experiment that says what it was asked."""

    def run(request):
        request.kept.mkdir(parents=True)
        (request.kept / "finished").touch()
        if error:
            raise error
        row = Row(name, ("a", "b"), "<some>", 0.5, 0.4, 0.6, None, request.samples or 7)
        table = Table("Of its own", ("x",), [(1.5,)], group=0)
        request.say("done")
        return Report(name, f"About {name}", [row], tables=[table])

    return Experiment(name, run, frozenset({"layers"}))


@pytest.fixture
def every(monkeypatch):
    """Puts other experiments in place of all."""

    def put(*parts):
        known = {part.name: part for part in parts}
        monkeypatch.setattr(commands, "OF_ALL", tuple(known))
        found = commands.find
        monkeypatch.setattr(commands, "find", lambda name: known.get(name) or found(name))

    return put


def test_all_of_them_have_folders_and_a_page(every, command, result, tmp_path):
    every(little("first"), little("second"))
    out = tmp_path / "out"
    found = command("all", "--data", "digits", "--out", out, "--json", tmp_path / "all.json")
    assert found.exit_code == 0, found.output
    assert "second: done" in found.output
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {
        *(f"{part}{name}" for part in ("", "first/", "second/") for name in (PAGE, RESULT)),
        "kept/first/finished",
        "kept/second/finished",
    }
    assert (tmp_path / "all.json").read_text() == (out / RESULT).read_text()
    told = result(out)
    assert told["rows"] == [*result(out / "first")["rows"], *result(out / "second")["rows"]]
    assert [row["samples"] for row in told["rows"]] == [7, 7]
    assert told["failures"] == {}
    assert [table["title"] for table in told["tables"]] == [
        "first: Of its own",
        "second: Of its own",
        "Experiments",
    ]
    page = (out / PAGE).read_text(encoding="utf-8")
    assert '<a href="second/report.html">About second</a>' in page
    assert "<td>second</td><td>a, b</td><td>&lt;some&gt;</td>" in page


def test_one_that_fails_does_not_lose_the_others(every, command, result, tmp_path):
    missing = InputError("no photographs <here>\n at all")
    every(little("first"), little("second", missing), little("third"))
    out = tmp_path / "out"
    found = command("all", "--data", "digits", "--out", out, "--samples", 3)
    assert found.exit_code == 1
    assert "error: second: no photographs <here> at all" in found.output
    assert sorted(file.name for file in out.iterdir()) == [
        "first",
        "kept",
        PAGE,
        RESULT,
        "third",
    ]
    told = result(out)
    assert told["failures"] == {"second": "no photographs <here> at all"}
    assert told["facts"]["experiments"] == "2 of 3"
    assert [row["experiment"] for row in told["rows"]] == ["first", "third"]
    assert [row["samples"] for row in told["rows"]] == [3, 3]
    assert told["tables"][-1]["lines"][1] == ["second", "failed", "no photographs <here> at all"]
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "no photographs &lt;here&gt; at all" in page
    assert "second/" not in page


def test_a_mistake_in_the_code_is_not_taken_for_missing_data(every, command, tmp_path):
    every(little("first"), little("second", ZeroDivisionError()))
    found = command("all", "--data", "digits", "--out", tmp_path / "out")
    assert isinstance(found.exception, ZeroDivisionError)


def test_all_of_them_go_on_after_an_interruption(every, command, result, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(recurrent, "draw", lambda found: Figure())

    def of(name, steps):
        def run(request):
            return replace(recurrent.run(request, steps), experiment=name)

        return Experiment(name, run)

    every(of("short", 3), of("rnn", 4))

    def all_of_them(out, code=0):
        found = command("all", "--data", "digits", "--out", out, "--samples", 1)
        assert found.exit_code == code, found.output

    whole, out = tmp_path / "whole", tmp_path / "out"
    all_of_them(whole)
    real, studied = recurrent.studied, []

    def interrupted(*given):
        studied.append(given)
        if len(studied) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(recurrent, "studied", interrupted)
    all_of_them(out, code=130)
    assert [file.name for file in out.iterdir()] == ["kept"]  # no half of a report
    all_of_them(out)
    assert studied[4:] == studied[3:4]  # nothing was trained again
    for part in (".", "short", "rnn"):
        assert result(out / part) == result(whole / part)


def test_layers_are_not_for_all_of_them(command, tmp_path):
    given = ("--data", "digits", "--out", tmp_path / "out", "--layers", "a,b")
    found = command("all", *given)
    assert found.exit_code == 2
    assert "--layers: all takes none" in found.output
