"""The command line, in-process, on tiny models saved to disk."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.cli import check, compare, demo, main
from omnisparse_flex.cost_model import costs_of

transformers = pytest.importorskip("transformers")
# transformers' own notices, e.g. on special token ids outside a tiny vocabulary, are logs, not warnings.


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json and nothing else."""
    path = tmp_path_factory.mktemp("qwen")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}  # fmt: skip
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, without a tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake leaves on standard error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "{demo,check,calibrate}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_a_checkout_finds_the_model_that_it_ships() -> None:
    assert demo.shipped() == Path(__file__).resolve().parents[2] / "models" / "video_needle"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, omnisparse_flex.cli as c; c._parser().format_help(); print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(("fixture", "sites"), [("qwen_dir", 2), ("llama_dir", 1)])
def test_no_run_lists_the_sites(
    fixture: str, sites: int, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(request.getfixturevalue(fixture)), "--no-run"]) == 0
    out = capsys.readouterr().out
    assert f"not compiled yet; {sites} sites would be rewritten, 0 skipped" in out
    assert len(re.findall(r"^\d+ .*self_attn.*omnisparse$", out, re.MULTILINE)) == sites


def test_bad_directories(tmp_path: Path, qwen_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model_dir must be a directory with a config.json" in complaint(capsys, "check", str(tmp_path / "no"))
    assert "model_dir must be a directory with a config.json" in complaint(capsys, "check", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(tmp_path), "--no-run")
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(tmp_path), "--no-run")
    # A config without weights: fine for --no-run alone.
    assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(qwen_dir), "--tokens", "8")


def test_corrupt_files(llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_dir, broken)
    whole = (broken / "model.safetensors").read_bytes()
    for weights in (b"", b"no header", whole[: len(whole) // 2]):
        (broken / "model.safetensors").write_bytes(weights)
        assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(broken), "--tokens", "8")
    fields = json.loads((llama_dir / "config.json").read_text())
    for wrong in ({"hidden_size": "wide"}, {"num_attention_heads": [4]}, {"rope_parameters": 3}, {"hidden_size": -1}):
        (broken / "config.json").write_text(json.dumps(fields | wrong))
        assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(broken), "--no-run")
    for text in ("[]", "3", '"x"', "\x00"):
        (broken / "config.json").write_text(text)
        assert "model_dir must be loadable by transformers" in complaint(capsys, "check", str(broken), "--no-run")


@pytest.mark.parametrize("kind", ["T5Config", "ViTConfig", "MambaConfig", "ElectraConfig"])
def test_unsupported_models(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(transformers, kind)().save_pretrained(tmp_path)
    assert "model must" in complaint(capsys, "check", str(tmp_path), "--no-run")


def test_bad_rules(qwen_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("check", str(qwen_dir), "--no-run", "--config")
    assert "target_recall must be in (0, 1], got 2" in complaint(capsys, *arguments, '{"target_recall": 2}')
    assert "config must hold only the fields" in complaint(capsys, *arguments, '{"recall": 1}')
    assert "config must be valid JSON" in complaint(capsys, *arguments, "{nothing")
    assert "config must be JSON text or an existing file" in complaint(capsys, *arguments, "nothing.json")


def test_rules_from_a_file(tmp_path: Path) -> None:
    rules = OmniSparseConfig(target_recall=0.7)
    (tmp_path / "rules.json").write_text(json.dumps(rules.to_dict()))
    assert check.config_from(str(tmp_path / "rules.json")) == rules
    assert check.config_from(None) == OmniSparseConfig()


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert "must be installed: pip install 'omnisparse-flex[demo]'" in complaint(capsys, "demo")


def test_a_video_for_a_text_model(llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, "check", str(llama_dir), "--video", str(tmp_path / "clip.mp4"))
    assert "video must be left out unless model_dir holds the model's own processor" in error


@pytest.mark.parametrize(
    ("measures", "want"),
    [
        ((1.0, 0.0, 1.0, 2.0, 0.5), check.VERDICTS[0]),
        ((1.0, 0.0, 1.0, 1.0, 0.5), check.VERDICTS[1]),
        ((1.0, 0.0, 1.0, 2.0, 1.075), check.VERDICTS[1]),
        ((0.9, 0.0, 1.0, 2.0, 0.5), check.VERDICTS[2]),
        ((1.0, 0.1, 1.0, 2.0, 0.5), check.VERDICTS[2]),
        ((1.0, 0.0, 0.5, 2.0, 0.5), check.VERDICTS[2]),
        ((1.0, float("nan"), 1.0, 2.0, 0.5), check.VERDICTS[2]),
    ],
)
def test_verdicts(measures: tuple[float, ...], want: str) -> None:
    assert check.verdict(*measures) == want


@pytest.mark.slow
def test_check_runs_a_model(
    llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], eager_inner: None
) -> None:
    picture = tmp_path / "heads.png"
    arguments = ["check", str(llama_dir), "--tokens", "600", "--prompt", "hello", "--min-seq-len", "256"]
    assert main([*arguments, "--heatmap", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    for line in ("no tokenizer in", "1 sites rewritten", "time to first token", "peak memory", "top-1 agreement over"):
        assert line in out
    assert "compiling sparse graph 1" in out
    assert re.search(r"^worst head's true recall: [01]\.\d+ \(layer 0, query head \d", out, re.MULTILINE)
    assert re.search(r"^verdict: (safe|not safe)", out, re.MULTILINE)


@pytest.fixture
def reader_dir(llama_dir: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer of a hundred words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path / "reader"
    shutil.copytree(llama_dir, path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_calibrate_writes_rules_that_check_reads(
    reader_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    eager_inner: None,
) -> None:
    text, out = tmp_path / "text", tmp_path / "rules.json"
    text.write_text(" ".join(f"w{i * i % 97}" for i in range(1700)))
    rules = '{"lazy_threshold": null, "sink_size": 1, "window_size": 1, "scoring": "tile_pool"}'
    arguments = ["--text", str(text), "--out", str(out), "--tokens", "700", "--min-seq-len", "128", "--config", rules]
    monkeypatch.setattr("omnisparse_flex.calibration.search.MAX_DENSITY", 1.0)  # six blocks: most are kept
    assert main(["calibrate", str(reader_dir), "--target-recall", "0.3", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 windows of 700 tokens from 1700" in printed and f"rules: {out}" in printed
    assert "true recall wanted 0.3" in printed and re.search(r"^0 .*omnisparse$", printed, re.MULTILINE)
    found = OmniSparseConfig.from_dict(json.loads(out.read_text()))
    assert len(found.target_recall) == 1 and found.recall_of(0) < 1 and found.scoring == "tile_pool"
    assert main(["check", str(reader_dir), "--no-run", "--config", str(out)]) == 0
    assert "1 sites would be rewritten" in capsys.readouterr().out


def test_calibrate_mistakes(
    llama_dir: Path, reader_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("w1 " * 300)

    def said(model: Path, recall: str = "0.9", *more: str, text: Path = text, out: Path = tmp_path / "o.json") -> str:
        given = ("--target-recall", recall, "--out", str(out), "--text", str(text), *more)
        return complaint(capsys, "calibrate", str(model), *given)

    assert "target_recall must be in (0, 1), got 1.0" in said(reader_dir, "1.0")
    assert "out must be a file in an existing directory, got" in said(reader_dir, out=tmp_path / "no" / "o.json")
    assert "out must be a file in an existing directory, got" in said(reader_dir, out=tmp_path)
    assert "text must be an existing file, got" in said(reader_dir, text=tmp_path / "missing")
    assert "model_dir must hold a tokenizer to read a text, got" in said(llama_dir)
    assert main(["calibrate", str(reader_dir), "--target-recall", "0.9", "--out", "o.json", "--text", str(text)]) == 2
    said_last = capsys.readouterr().err
    assert re.search(r"calibrate: batches must hold at least min_seq_len = \d{4,} tokens \(an option", said_last)
    assert "config must hold only the fields" in said(reader_dir, "0.9", "--config", '{"recall": 1}')
    (tmp_path / "latin").write_bytes(b"\xff\xfe w1")
    assert "text must be UTF-8, got" in said(reader_dir, text=tmp_path / "latin")
    (tmp_path / "empty").write_text(" ")
    assert "text must hold at least one token, got" in said(reader_dir, text=tmp_path / "empty")
    assert not (tmp_path / "o.json").exists()
    for missing in (["--text", "x"], ["--target-recall", "0.9"], []):
        said_then = complaint(capsys, "calibrate", str(reader_dir), "--out", "o.json", *missing)
        assert (
            "calibrate must be given --target-recall, --out, and --text or --video, or else --speed, got" in said_then
        )
    assert "heatmap must be a file in an existing directory" in complaint(
        capsys, "check", str(llama_dir), "--heatmap", str(tmp_path / "no" / "x.png")
    )


def test_distances() -> None:
    exact = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert compare.relative_error(exact, exact) == compare.mean_kl(exact, exact) == 0.0
    assert compare.relative_error(torch.zeros_like(exact), exact) == 1.0
    assert compare.top1_agreement(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), exact) == 0.5
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    assert compare.mean_kl(q.log()[None], p.log()[None]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_progress_shows_life(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("omnisparse_flex.calibration.progress.HEARTBEAT_S", 0.02)
    with Progress().step("compiling"):
        time.sleep(0.1)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[ +0\.\d s\] compiling \.\.\.", lines[0])
    assert "still at it" in lines[1] and re.search(r"compiling: 0\.\d s$", lines[-1])


def test_calibrate_speed_measures_the_machine_and_remembers(llama_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "costs.json"
    monkeypatch.setenv("OMNISPARSE_COSTS", str(path))
    monkeypatch.setattr("omnisparse_flex.calibration.device_speed.LENGTHS", {"cpu": (256, 384), "cuda": (256, 384)})
    monkeypatch.setattr("omnisparse_flex.backend.Backend.inner_for", lambda *_: "eager")  # no wait for Inductor
    monkeypatch.setattr("omnisparse_flex.backend._compile", lambda graph_module, *_, **__: graph_module.forward)
    assert main(["calibrate", str(llama_dir), "--speed"]) == 0
    said = capsys.readouterr().out
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    costs = costs_of(device)
    assert path.exists() and costs.shortest == 256 and costs.dense + costs.dense_call > 0
    assert f"{device}, 4/2 heads of 16: sparse" in said and str(path) in said
    assert said.count("dense attention, ") == 4, "each length once, announced and done"
    missing = complaint(capsys, "calibrate", str(tmp_path), "--speed")
    assert "model_dir must be a directory with a config.json" in missing
