"""toolkit.load and `python -m toolkit.generate`, on a run that was written without training."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import toolkit
from tests.asking import QUESTIONS, TOKENIZER, picture
from tests.compositions import one
from toolkit import Sampling, checkpoint, generate, questions
from toolkit.build import build_model, from_dict
from toolkit.explain import BadRecipe
from toolkit.rundir import RunDir

Q = QUESTIONS[0]


def write_run(root: Path, *words: str) -> Path:
    """The directory of a finished run with random weights."""
    cfg = one("encoder=patch", "encoder.image_size=32", "hardware.device=cpu", *words)
    run = RunDir(root, cfg)
    run.path.mkdir(parents=True)
    run.config.write_text(OmegaConf.to_yaml(OmegaConf.create(cfg)), encoding="utf-8")
    TOKENIZER.save(run.path / "vocabulary.json")
    torch.manual_seed(0)
    model = build_model(from_dict(cfg), vocab_size=TOKENIZER.size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    parts = ["encoder", "proj", "rwkv"]
    weights = {checkpoint.WEIGHTS: checkpoint.weights_of(model, parts)}
    checkpoint.write(run.weights, weights, {"parts": parts})
    run.result.write_text('{"accuracy": 0.5}')
    return run.path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("a") / "runs")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory that holds `runs` and two pictures."""
    home = folder.parent.parent
    for number in (1, 2):
        picture(number).save(home / f"{number}.png")
    monkeypatch.chdir(home)
    yield home


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = generate.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_three_lines_answer(folder: Path, here: Path) -> None:
    model = toolkit.load(folder)
    options = Sampling(max_new_tokens=6)
    text = model.answer("1.png", Q, options)
    assert (
        text == model.answer(Path("1.png").read_bytes(), Q, options) == model.answer(picture(1), Q, options)
    )
    assert text == "".join(model.stream("1.png", Q, options))
    assert model.logits(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, TOKENIZER.size)
    assert model.name == f"run {folder.name.rsplit('-', 1)[1]}"
    assert not model.rwkv.training and not any(p.requires_grad for p in model.rwkv.parameters())
    assert toolkit.load(folder, precision="bf16").bf16


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, toolkit, toolkit.generate; toolkit.load; toolkit.Sampling(temperature=1)\n"
        "assert toolkit.generate.main(['run=nowhere', 'prompt=hi']) == 2\n"
        "assert toolkit.generate.main(['--help']) == 0\n"
        "sys.exit(bool({'torch', 'numpy', 'PIL', 'lightning'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_command_answers_as_the_api(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Sampling(max_new_tokens=8, temperature=1.5, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=4)
    words = (
        "max_new_tokens=8",
        "temperature=1.5",
        "top_p=0.9",
        "top_k=20",
        "repetition_penalty=1.2",
        "seed=4",
    )
    expected = toolkit.load(folder).answer("1.png", Q, options)
    by_name = f"run={folder.name}"
    assert told(capsys, by_name, "image=1.png", f"prompt={Q}", *words) == (0, expected + "\n", "")
    assert told(capsys, f"run={folder}", "image=1.png", f"prompt={Q}", *words)[1] == expected + "\n"


def test_chat_keeps_the_state_and_goes_on_from_a_file(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = toolkit.load(folder).chat("1.png")
    options = Sampling(max_new_tokens=8)
    first, second, third = (chat.ask(text, options) for text in QUESTIONS)
    base = (f"run={folder}", "max_new_tokens=8")
    typed = f"{QUESTIONS[0]}\n\nare there dragons?\n{QUESTIONS[1]}\n/save s.st\n/what\n/new\n{QUESTIONS[0]}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code, out, err = told(capsys, *base, "image=1.png", "--chat")
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert "model.vocab=world" in err and "state: s.st" in err and "commands:" in err
    assert told(capsys, *base, "state=s.st", f"prompt={QUESTIONS[2]}") == (0, f"{third}\n", "")
    told(capsys, *base, "image=1.png", f"prompt={QUESTIONS[0]}", "save=t.st")
    assert told(capsys, *base, "state=t.st", f"prompt={QUESTIONS[1]}")[1] == f"{second}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/new\n{QUESTIONS[1]}\n"))
    code, out, err = told(capsys, *base, "state=t.st", "--chat")
    assert (code, out) == (0, f"{second}\n") and "holds no picture" in err


def test_an_image_alone_can_be_kept_where_it_comes_first(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, "prompt=prefix")
    assert told(capsys, f"run={run}", "image=1.png", "save=look.st")[0] == 0
    expected = told(capsys, f"run={run}", "image=1.png", f"prompt={Q}", "max_new_tokens=8")
    assert told(capsys, f"run={run}", "state=look.st", f"prompt={Q}", "max_new_tokens=8") == expected
    code, _, err = told(capsys, f"run={here / 'runs'}/{next((here / 'runs').iterdir()).name}",
                        "state=look.st", f"prompt={Q}")  # fmt: skip
    assert code == 1 and "look.st: is a state of run " in err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_is_answered_in_order_and_goes_on_where_it_was_cut(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"image": f"{1 + i % 2}.png", "prompt": QUESTIONS[i % 3], "id": f"q{9 - i}"} for i in range(7)]
    asked.append({"prompt": Q})  # type: ignore[arg-type]
    Path("q.jsonl").write_text("".join(json.dumps(a) + "\n\n" for a in asked))
    words = [f"run={folder}", "file=q.jsonl", "batch=3", "max_new_tokens=6"]
    out = Path("deep/a.jsonl")
    assert told(capsys, *words, f"out={out}")[2] == f"8 of 8 answered now: {out}\n"
    rows = lines(out)
    assert [r["id"] for r in rows] == [*(a["id"] for a in asked[:-1]), "15"]
    model = toolkit.load(folder)
    alone = [model.answer(a.get("image"), a["prompt"], Sampling(max_new_tokens=6)) for a in asked]
    assert [r["answer"] for r in rows] == alone
    held = out.read_bytes()
    out.write_bytes(held[: held.index(b'"q6"') + 2])
    assert told(capsys, *words, f"out={out}")[2] == f"5 of 8 answered now: {out}\n"
    assert out.read_bytes() == held
    printed = told(capsys, *words)[1]
    assert printed.encode() == held
    code, _, err = told(capsys, *words[:-1], "max_new_tokens=5", f"out={out}")
    assert code == 1 and "a.jsonl:1: was answered by another model or with other options" in err
    Path("q.jsonl").write_text(json.dumps(asked[1]) + "\n")
    assert "is no answer to question 'q8'" in told(capsys, *words, f"out={out}")[2]
    Path("q.jsonl").write_text(json.dumps(asked[0]) + "\n")
    assert "holds 8 answers to 1 questions" in told(capsys, *words, f"out={out}")[2]
    assert out.read_bytes() == held


def test_odd_line_ends_inside_texts_end_no_line(tmp_path: Path) -> None:
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    odd = "a\u2028b\x85c"
    file.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in (odd, "d")))
    asked = questions.read(file)
    assert [q.prompt for q in asked] == [odd, "d"]
    row = {"id": "1", "image": "", "prompt": odd, "answer": odd, "by": "x"}
    out.write_text(questions.dumped(row) + "\n" + '{"id": "2", "ima')
    assert questions.resumed(out, asked, "x") == 1
    assert out.read_text() == questions.dumped(row) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "q.jsonl:2: not valid JSON"),
        ("[]", "q.jsonl:2: a question is one JSON object on a line"),
        ('{"promt": "hi"}', "q.jsonl:2: promt: no such field\n  did you mean: prompt"),
        ("{}", "q.jsonl:2: prompt: not given"),
        ('{"prompt": 3}', "q.jsonl:2: prompt: takes text, given 3"),
        ('{"prompt": "hi", "image": "no.png"}', "q.jsonl:2: image: 'no.png' is no file in"),
        ('{"prompt": "hi", "id": "1"}', "q.jsonl:2: id: '1' is given twice"),
        ('{"prompt": "<image> hi"}', "q.jsonl:2: prompt: holds <image>, but there is no image"),
    ],
)
def test_a_bad_question_is_told_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "hi"}\n' + line + "\n")
    with pytest.raises(BadRecipe) as error:
        questions.read(file)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "run: no run is named\n  fix: write run=FOLDER with one of these\n    runs/rwkv6-2d-sandwich-s0-",
        ),
        (
            ["run=rwkv6-2d-sandwch", "prompt=a"],
            "'rwkv6-2d-sandwch' is no finished run\n  did you mean: run=runs/",
        ),
        (["prmpt=a"], "prmpt: no such key\n  did you mean: prompt"),
        (["run=X"], "prompt: not given"),
        (["run=X", "is it red?"], "'is it red?' is no key=value\n  fix: prompt=\"is it red?\""),
        (["run=X", "prompt=a", "prompt=b"], "prompt: given twice"),
        (["run=X", "prompt=a", "top_p=2"], "top_p: given 2.0, must be above 0 to 1"),
        (["run=X", "prompt=a", "top_p=0.5"], "write temperature=1, or leave them out"),
        (["run=X", "prompt=a", "seed=x"], "seed: takes int, given 'x'"),
        (["run=X", "prompt=a", "image=no.png"], "image: no file 'no.png'"),
        (["run=X", "prompt=a", "--chat"], "--chat: given beside prompt"),
        (["run=X", "prompt=a", "image=1.png", "state=1.png"], "image: given beside state"),
        (["run=X", "prompt=a", "out=a"], "out: given without file"),
        (["run=X", "--caht"], "no option --caht\n  did you mean: --chat"),
        (["run=X", "prompt=a", "device=gpu"], "device: given 'gpu', must be one of auto, cpu, cuda"),
    ],
)
def test_a_wrong_command_is_told_what_to_write(
    words: list[str], message: str, here: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = told(capsys, *(w.replace("run=X", f"run={folder}") for w in words))
    assert (code, out) == (2, "") and message in err


def test_what_cannot_be_written_is_told(
    here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "taken").mkdir()
    (here / "q.jsonl").write_text(json.dumps({"prompt": Q}) + "\n")
    for words in ([f"prompt={Q}", "save=taken"], ["file=q.jsonl", "out=taken"]):
        code, _, err = told(capsys, f"run={folder}", "max_new_tokens=2", *words)
        assert code == 1 and "taken: " in err and "written there" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{Q}\n/save taken\n{Q}\n"))  # the conversation goes on
    code, out, err = told(capsys, f"run={folder}", "max_new_tokens=2", "--chat")
    assert code == 0 and len(out.splitlines()) == 2 and "written there" in err


def test_where_no_run_is_finished_the_message_says_how_to_get_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no finished run is in `runs`; `python -m toolkit.run` makes one" in told(capsys)[2]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((folder / "config.yaml").read_text())
    assert "its training has not ended" in told(capsys, "run=begun", "prompt=a")[2]
    with pytest.raises(ValueError, match="its training has not ended"):
        toolkit.load(begun)
    with pytest.raises(ValueError, match="neither a run's directory nor a converted language model"):
        toolkit.load(tmp_path)
    for words in ({"device": "gpu"}, {"precision": "fp16"}):
        with pytest.raises(ValueError, match=r"write (device|precision)="):
            toolkit.load(folder, **words)  # type: ignore[arg-type]


def test_a_runs_config_is_data(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    config = run / "config.yaml"
    text = config.read_text()
    for old, new, message in [
        ("name: 2d", "name: diagonal", r"config\.yaml:\d+: scan: no scan named 'diagonal'"),
        ("  columns:", "  colums:", r"scan\.colums: no such key in scan '2d'\n  did you mean: columns"),
        ("seed:", "sede:", r"config\.yaml:\d+: sede: no such key"),
        ("  n_layer:", "  n_layers:", "n_layers: no such key"),
        ("columns: true", "columns: maybe", r"config\.yaml:\d+: scan\.columns: takes bool, given 'maybe'"),
        ("seed: 0", "seed: -1", r"config\.yaml:\d+: seed: given -1, must be from 0"),
        ("precision: fp32", "precision: fp8", r"config\.yaml:\d+: hardware\.precision: given 'fp8'"),
        ("  n_layer: 3", "  n_layer: null", r"config\.yaml:\d+: model\.n_layer: takes int"),
        ("seed: 0", "seed: !!python/object/apply:os.getcwd []", "runs Python|not valid YAML"),
    ]:
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            toolkit.load(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (checkpoint.FACTS, b'{"par'),
        (checkpoint.FACTS, b"[]"),
        (checkpoint.FACTS, b"{}"),
        (checkpoint.WEIGHTS, b""),
        (checkpoint.WEIGHTS, None),
    ],
)
def test_a_damaged_checkpoint_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = run / "checkpoints" / "last" / name
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match=rf"{name}: no") as error:
        toolkit.load(run)
    assert str(file) in str(error.value)


def test_weights_of_another_size_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    config = OmegaConf.load(run / "config.yaml")
    config.model.d_model *= 2
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit this model; .* of another shape"):
        toolkit.load(run)


def test_plug_ins_are_imported_only_if_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "evil_plugin.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = run / "config.yaml"
    text = config.read_text().replace("plugins: []", "plugins:\n- evil_plugin")
    config.write_text(text.replace("name: 2d", "name: theirs"))
    with pytest.raises(ValueError, match=r"plugins=\[evil_plugin\] if you trust that code"):
        toolkit.load(run)
    assert not marker.exists()
    config.write_text(text)
    toolkit.load(run)
    assert not marker.exists()
    toolkit.load(run, plugins=["evil_plugin"])
    assert marker.exists()
