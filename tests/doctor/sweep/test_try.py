import pytest, json, time
from dataclasses import replace


def test_try(options, tmp_path, capsys):
    from hemostat.doctor import run

    t = time.process_time()
    assert run(replace(options, json=tmp_path / "r.json", html=tmp_path / "r.html")) == 0
    open("/tmp/w/sweep_out.txt", "w").write(capsys.readouterr().out + f"\n{time.process_time() - t}")
    import shutil

    shutil.copy(tmp_path / "r.html", "/tmp/w/sweep_r.html")
    shutil.copy(tmp_path / "r.json", "/tmp/w/sweep_r.json")
