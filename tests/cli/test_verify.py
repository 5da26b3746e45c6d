"""`verify`, `evaluate`, `inspect` and `env`: reports on stdout, and an exit code that a script can trust."""

from __future__ import annotations

import json
from pathlib import Path

GOOD = {"ok": True, "checks": [{"name": "keys", "ok": True, "detail": "420 of 420"}]}
BAD = {"ok": False, "checks": [*GOOD["checks"], {"name": "differs from base", "ok": False, "detail": "max 0.0"}]}


def test_verify_prints_each_check(api, tunesmith_command):
    api.answers["verify_path"] = GOOD
    code, out, err = tunesmith_command("verify", "runs/a", "--base", "m")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"ok    {'keys':<28} 420 of 420", "all 1 checks hold"]
    assert api.calls == [("verify_path", (Path("runs/a"),), {"base": "m"})]


def test_a_failed_check_is_exit_code_4(api, tunesmith_command):
    api.answers["verify_path"] = BAD
    code, out, _ = tunesmith_command("verify", "runs/a")
    assert code == 4
    assert "FAIL  differs from base" in out
    assert out.splitlines()[-1] == "1 of 2 checks failed"
    code, out, _ = tunesmith_command("verify", "runs/a", "--json")
    assert (code, json.loads(out)) == (4, BAD)


def test_evaluate(api, tunesmith_command):
    api.answers["evaluate"] = {"accuracy": 0.91234, "rows": 500}
    code, out, _ = tunesmith_command(
        "evaluate", "runs/a", "--metrics", "accuracy,eval_loss", "--metrics", "f1", "--rows", "5"
    )
    assert (code, out) == (0, f"{'accuracy':<24} 0.9123\n{'rows':<24} 500\n")
    settings = api.calls[0][2]
    assert (settings["metrics"], settings["rows"], settings["split"]) == (["accuracy", "eval_loss", "f1"], 5, "test")
    assert json.loads(tunesmith_command("evaluate", "runs/a", "--json")[1])["accuracy"] == 0.91234


def test_env_prints_versions(tunesmith_command):
    code, out, _ = tunesmith_command("env", "--json")
    assert code == 0
    assert {"tunesmith", "python"} <= set(json.loads(out))
    assert tunesmith_command("env")[1].startswith("tunesmith  ")


def test_inspect_refuses_what_it_does_not_know(tunesmith_command, tmp_path):
    assert tunesmith_command("inspect", str(tmp_path / "none"))[0] == 2
    code, out, err = tunesmith_command("inspect", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
