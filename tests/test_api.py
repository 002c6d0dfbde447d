"""The Python interface, as docs/python.md has it."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kmebench
from kmebench import api
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.errors import ConfigError, KMEBenchError, ModelError
from kmebench.models import sources
from kmebench.models.sources import save_model
from tests.gguf_files import write_gguf

ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"
FACT = kmebench.fact("France", "The capital of {} is", "Rome")


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """A folder with a model that bears the name of the docs' one."""
    path = tmp_path_factory.mktemp("api") / "smollm2-135m"
    save_model(trained.model, trained.tokenizer, path)
    return path


@pytest.fixture(autouse=True)
def outside(saved, tmp_path, monkeypatch):
    """Beside that folder, far from the workflow, with an empty cache and no network."""

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "snapshot_download", refuse)


@pytest.fixture(scope="module")
def loaded(saved):
    return kmebench.load(saved, device="cpu")


@pytest.fixture
def model(loaded):
    yield loaded
    loaded.revert()


def bits(model):
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def differ(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_the_lines_of_the_docs_run_as_they_stand(tmp_path, capsys):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line]) < 10
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    before, after = capsys.readouterr().out.splitlines()[0].split(" -> ")
    assert before.startswith("Paris")
    assert after.startswith("Rome")
    assert AutoModelForCausalLM.from_pretrained("edited").num_parameters()


def test_an_edit_is_taken_back_and_applied_again_bit_by_bit(model, tmp_path):
    untouched = bits(model)
    result = kmebench.edit(model, "full-c", [FACT], steps=2, layers=[1])
    edited = bits(model)
    assert set(result.edit.weights) == differ(untouched, edited)
    result.edit.save(tmp_path / "edit.safetensors")
    model.revert()
    assert not differ(untouched, bits(model))
    model.apply(kmebench.Edit.load(tmp_path / "edit.safetensors"))
    assert not differ(edited, bits(model))


def test_a_covariance_is_measured_on_the_unedited_model_once_and_cached(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(api, "TextSettings", partial(TextSettings, tokens=1024))
    kmebench.edit(model, "full-c", [FACT], steps=2)
    before = bits(model)
    values = {"layer": 1, "steps": 2}
    kmebench.editor(model, "rome", **values)
    assert not differ(before, bits(model))
    (file,) = (tmp_path / "cache/kmebench/covariance").glob("*.safetensors")
    assert Covariances.open(file).layers == (1,)
    first = Covariances.open(file).of(1)
    measured = file.stat().st_mtime_ns
    kmebench.edit(model, "rome", [FACT], **values)
    assert file.stat().st_mtime_ns == measured
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(KMEBenchError, match="is damaged"):
        kmebench.edit(model, kmebench.editor(model, "rome", covariance=theirs, **values), [FACT])
    assert theirs.is_file()
    file.unlink()
    model.revert()
    kmebench.editor(model, "rome", **values)
    assert torch.equal(first, Covariances.open(file).of(1))


def test_an_editor_that_is_built_once_remembers(model):
    lora, fresh = (kmebench.editor(model, "lora", steps=2) for _ in range(2))
    kmebench.edit(model, lora, [FACT])
    assert lora.state_dict().keys() > fresh.state_dict().keys()
    with pytest.raises(ConfigError, match="has its values already"):
        kmebench.edit(model, lora, [FACT], steps=3)


def test_a_codebook_travels_with_the_model_and_not_with_its_weights(model):
    for country, target in (("France", "Rome"), ("Peru", "Oslo")):
        fact = kmebench.fact(country, FACT.prompt, target)
        kmebench.edit(model, "grace", [fact], layer=1, steps=2)
    assert model.edits.overlays["grace"].entries == 2
    with pytest.raises(ModelError, match="grace are no weights"):
        kmebench.save(model, "elsewhere")
    assert not Path("elsewhere").exists()


def test_an_edit_of_another_model_is_refused_before_anything_changes(model, make_model, requests):
    other = make_model("llama", torch.float32)
    edit = kmebench.edit(model, "full-c", [FACT], steps=1).edit
    before = bits(other)
    with pytest.raises(ModelError, match="which this model lacks"):
        other.apply(edit)
    assert not differ(before, bits(other))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: kmebench.load("smollm2"), "There is no model 'smollm2': it is no folder"),
        (lambda m: kmebench.load("none.gguf"), "There is no file none.gguf"),
        (lambda m: kmebench.load("."), "holds no Hugging Face model"),
        (lambda m: kmebench.load("smollm2-135m", dtype="fp16"), "dtype cannot be 'fp16'"),
        (lambda m: kmebench.load("smollm2-135m", device="gpu"), "did you mean 'cuda'?"),
        (lambda m: kmebench.load("smollm2-135m", revision="x"), "only a repository of the hub"),
        (lambda m: kmebench.load("owner/name"), "owner/name at revision main could not be"),
        (lambda m: kmebench.load("owner/name", revision="1f"), "at revision 1f could not be"),
        (lambda m: kmebench.load("smollm2-135m", ["none.yaml"]), "There is no config"),
        (lambda m: kmebench.fact("France", "It is", "Rome"), "holds no {}"),
        (lambda m: kmebench.edit(m, "full-c", []), "There is no fact to edit"),
        (lambda m: kmebench.edit(m, "full-c", FACT), "Give the facts as a list"),
        (lambda m: kmebench.edit(m, "full-c", ["France"]), "Give the facts as a list"),
        (lambda m: kmebench.edit(m, None, [FACT]), "A method is a name, or an editor"),
        (lambda m: kmebench.editor(m, "full-c", mode="both"), "mode cannot be 'both'"),
        (lambda m: kmebench.load("smollm2-135m", dtype=torch.float32), "did you mean 'float32'?"),
        (lambda m: kmebench.load("smollm2-135m/config.json"), "is a file: name its folder"),
        (lambda m: kmebench.fact("", "It is {}", "Rome"), "subject is empty"),
        (lambda m: m.apply("edit.safetensors"), "A str is no edit"),
        (lambda m: kmebench.edit(m, "ful-c", [FACT]), "did you mean 'full-c'?"),
        (lambda m: kmebench.edit(m, "full-c", [FACT], stepz=1), "did you mean 'steps'?"),
        (lambda m: kmebench.edit(m, "full-c", [FACT], steps=-1), "steps cannot be -1"),
        (lambda m: kmebench.edit(m, "no.such:CARD", [FACT]), "cannot be imported"),
        (lambda m: kmebench.edit(m, "rome", [FACT], covariance="none"), "none cannot be read"),
        (lambda m: kmebench.save(m, "smollm2-135m"), "smollm2-135m exists already"),
        (lambda m: kmebench.save(m, None), "A folder is a path; not None"),
        (lambda m: kmebench.save("m", "out"), "A model is what kmebench.load returns, not a str"),
        (lambda m: kmebench.says(m, None), "the prompt is no text but a NoneType"),
        (lambda m: kmebench.says(m, " "), "the prompt is empty"),
        (lambda m: kmebench.says(m, PROMPT, tokens=0), "tokens cannot be 0"),
        (lambda m: kmebench.says("m", PROMPT), "A model is what kmebench.load returns, not a str"),
        (lambda m: kmebench.likeliest(m, None), "the prompt is no text but a NoneType"),
        (lambda m: kmebench.likeliest(m, PROMPT, 1.5), "count cannot be 1.5: it is a whole"),
        (lambda m: kmebench.likeliest(m, PROMPT, 10**9), "count cannot be 1000000000"),
        (lambda m: kmebench.next_token(m, 3), "the prompt is no text but a int"),
        (lambda m: kmebench.edit("m", "full-c", [FACT]), "A model to edit is what kmebench.load"),
        (lambda m: kmebench.editor(m, None), "A method is a name; not None"),
        (lambda m: kmebench.load("smollm2-135m", "my.yaml"), "configfiles is a list of files"),
        (
            lambda m: kmebench.editor(kmebench.Model(m.model, m.tokenizer), "rome", layer=1),
            "was not loaded by kmebench.load",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(call, complaint, model):
    with pytest.raises(KMEBenchError, match=re.escape(complaint)) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_config_needs_the_workflow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    Path("empty.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match="There is no Snakefile here"):
        kmebench.load("tiny-gptj", ["empty.yaml"])


def test_a_gguf_file_is_read_once(trained, make_model, tokenizer, tmp_path):
    original = make_model("llama", torch.float32)
    write_gguf(tmp_path / "small.gguf", original.model, tokenizer)
    model, name = kmebench.load(tmp_path / "small.gguf", device="cpu"), "model.norm.weight"
    assert torch.equal(model.parameter(name), original.parameter(name))
    assert kmebench.says(model, PROMPT) is not None
    (folder,) = (tmp_path / "cache/kmebench/models").iterdir()
    assert folder == model.folder
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"broken.gguf cannot be read as a model in GGUF"):
        kmebench.load(tmp_path / "broken.gguf")


def test_the_package_names_its_interface_and_imports_no_torch():
    assert kmebench.__all__ == api.__all__
    program = (
        "import sys, kmebench; assert set(kmebench.__all__) <= set(dir(kmebench)); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
