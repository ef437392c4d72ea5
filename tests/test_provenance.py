"""What is remembered of where answers come from: the command, the versions, the machine."""

import json
import re
import shlex

import click
import pytest
from click.testing import CliRunner

from batchrun import provenance
from batchrun.cli.options import ARGUMENTS, SectionCommand
from batchrun.jobs.folder import create
from batchrun.jobs.journal.schema import COMMAND
from batchrun.provenance import call, command_line, setup, without_secrets
from tests.jobs.conftest import prompts, spec  # noqa: F401 - fixtures


def test_a_command_can_be_typed_again():
    arguments = ["submit", "my prompts.parquet", "--template", "Say: {text} $HOME", "--stop", ""]
    assert shlex.split(command_line(arguments)) == ["batchrun", *arguments]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b.parquet", None),
        ("s3://anonymous@bucket/b.parquet", None),
        ("abfs://disk@store.dfs.core.windows.net/a@b.csv", None),
        ("not a URL: a@b?c", None),
        ("https://host:8080/a", None),
        ("https://user:secret@host/a?token=secret#secret", "https://...@host/a?..."),
        ("https://secret@host/a", "https://...@host/a"),
        ("s3://key:se/cr@et?secret#@bucket/a", "s3://...@bucket/a"),
        ("s3://bucket/a?X-Amz-Signature=secret", "s3://bucket/a?..."),
        ("ray://user:secret@head:10001", "ray://...@head:10001"),
        ("--output=HTTPS://u:secret@h/x", "--output=HTTPS://...@h/x"),
        (
            "see http://u:secret@h/ and http://h/?secret too",
            "see http://...@h/ and http://h/?... too",
        ),
    ],
)
def test_what_is_secret_in_a_url_is_not_kept(url, shown):
    assert without_secrets(url) == (shown or url)
    assert "secret" not in command_line(["submit", url])
    assert "secret" not in call([url, url], {"output": url, "template_args": {"a": [url]}})


def test_a_call_names_what_was_given():
    options = {"model": None, "max_tokens": 4, "stop": ["a'b"], "again": None}
    assert (
        call(["a.parquet"], options) == "batchrun.submit('a.parquet', max_tokens=4, stop=[\"a'b\"])"
    )
    assert call(["a", "b"], {}) == "batchrun.submit(['a', 'b'])"
    assert call(1234, {"n": 2}) == "batchrun.submit(<1,234 rows>, n=2)"


def test_the_command_for_the_end_may_hold_secrets_and_is_not_kept():
    hook = "curl https://hooks.example.com/services/T0/secret"
    assert command_line(["submit", "a", "--on-done", hook]) == "batchrun submit a --on-done ..."
    assert "secret" not in command_line(["submit", f"--on-done={hook}\n secret"])
    assert command_line(["--on-done", "--on-done", "a"]) == "batchrun --on-done ... a"
    assert call(["a"], {"on_done": hook, "n": 2}) == "batchrun.submit('a', on_done='...', n=2)"


def test_versions_and_machine_are_those_of_this_process():
    found = setup()
    assert json.loads(json.dumps(found)) == found
    assert re.match(r"\d+\.\d+", found["versions"]["torch"])
    assert {"batchrun", "python", "transformers"} <= found["versions"].keys()
    assert found["cores"] >= 1
    assert found["memory"] > 1 << 28


def test_gpus_are_those_that_the_driver_names(tmp_path, monkeypatch):
    nvidia = tmp_path / "proc/driver/nvidia"
    for place in ("0000:01:00.0", "0000:02:00.0"):
        (nvidia / "gpus" / place).mkdir(parents=True)
        (nvidia / "gpus" / place / "information").write_text("Model: \t\t NVIDIA H100\nIRQ:  1\n")
    said = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue May 1 2026\nGCC: 12.2.0"
    (nvidia / "version").write_text(said)
    found = setup(tmp_path)
    assert (found["gpus"], found["driver"]) == (["NVIDIA H100"] * 2, "580.159.04")
    monkeypatch.setattr(provenance, "_PACKAGES", ("a-package-that-nobody-has",))
    bare = setup(tmp_path / "elsewhere")
    assert (bare["gpus"], bare["driver"]) == ([], None)
    assert bare["versions"].keys() == {"batchrun", "python"}


def test_a_job_remembers_its_command(tmp_path, spec):  # noqa: F811
    with create(tmp_path, spec, command="batchrun submit x").journal() as journal:
        assert journal.meta(COMMAND) == "batchrun submit x"
        journal.check()
    with create(tmp_path, spec).journal() as journal:
        assert journal.meta(COMMAND) is None


def test_arguments_are_kept_as_they_were_typed():
    @click.command("submit", cls=SectionCommand)
    @click.argument("names", nargs=-1)
    @click.option("--flag", "-f")
    @click.pass_context
    def command(context, names, flag):
        click.echo(json.dumps(context.meta[ARGUMENTS]))

    shown = CliRunner().invoke(command, ["-f", "a b", "x", "--", "-y"])
    assert json.loads(shown.output) == ["submit", "-f", "a b", "x", "--", "-y"]
