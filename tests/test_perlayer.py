"""Layers that differ in their heads: plain Transformers builds them after `import attnopt`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from dha_models import decoder, ids, uneven

import attnopt
from attnopt.artifacts.saving import Result
from attnopt.perlayer import stand_in


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A model of which the second layer has half the keys and values of the first."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    decoder("llama").save_pretrained(folder)
    return uneven(folder)


@pytest.fixture(scope="module")
def saved(unlike: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attnopt.save(unlike, tmp_path_factory.mktemp("tier1") / "out")


def in_a_fresh_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_the_config_says_how_layers_differ(unlike: Result, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"num_key_value_heads": 2}}
    assert config["num_key_value_heads"] == 4
    assert config["attnopt"]["tier"] == 1
    assert config["attnopt"]["must_understand"] == ["per_layer_heads"]
    assert unlike.measured is not None
    assert unlike.measured["tier"] == 1
    assert unlike.measured["kv_bytes_per_token"] == [512, 384]
    assert "import attnopt" in (saved / "README.md").read_text()


def test_importing_attnopt_lets_transformers_load_it(unlike: Result, saved: Path) -> None:
    tokens = ids(2, 13)
    torch.save(tokens, saved.parent / "tokens.pt")
    code = f"""
import sys, attnopt
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch, transformers
from transformers.models.llama import modeling_llama
model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
tokens = torch.load("tokens.pt")
with torch.no_grad():
    result = model(input_ids=tokens, use_cache=True, output_attentions=True)
    static = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                            cache_implementation="static")
    plain = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
assert torch.equal(static, plain)
assert [l.keys.shape[1] for l in result.past_key_values.layers] == [4, 2]
assert type(model.model.layers[1].self_attn) is modeling_llama.LlamaAttention
assert modeling_llama.LlamaAttention.__module__.startswith("transformers")
model.half().float()
model.set_attn_implementation("eager")
with torch.no_grad():
    eager = model(input_ids=tokens, output_attentions=True)
assert len(eager.attentions) == 2
torch.testing.assert_close(eager.logits, result.logits, rtol=1e-2, atol=1e-2)
again = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
again.save_pretrained("again")
third = transformers.AutoModelForCausalLM.from_pretrained("again")
with torch.no_grad():
    assert torch.equal(third(input_ids=tokens).logits, result.logits)
torch.save(result.logits, "logits.pt")
"""
    done = in_a_fresh_process(code, saved.parent)
    assert done.returncode == 0, done.stderr
    logits = torch.load(saved.parent / "logits.pt")
    torch.testing.assert_close(logits, unlike.program(input_ids=tokens).logits, rtol=0, atol=1e-5)


def test_without_attnopt_loading_fails_loudly(saved: Path) -> None:
    code = f"""
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
"""
    done = in_a_fresh_process(code, saved.parent)
    assert done.returncode == 1
    assert "size mismatch" in done.stderr or "ignore_mismatched_sizes" in done.stderr


def test_export_to_stock_is_loaded_without_attnopt(
    unlike: Result, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnopt.cli import main

    assert main(["export", str(saved), "--to", "stock", "-o", str(tmp_path / "plain")]) == 0
    assert "4 key and value heads in every layer" in capsys.readouterr().out
    tokens = ids(2, 13)
    torch.save((tokens, unlike.program(input_ids=tokens).logits), tmp_path / "wanted.pt")
    ran = in_a_fresh_process(
        """
import sys, torch, transformers
model = transformers.LlamaForCausalLM.from_pretrained("plain")
tokens, logits = torch.load("wanted.pt")
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("attnopt") for name in sys.modules)
assert {p.shape[0] for n, p in model.named_parameters() if "k_proj" in n} == {32}
""",
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr


def test_load_checks_it_as_it_checks_every_artifact(unlike: Result, saved: Path) -> None:
    model = attnopt.load(saved)
    tokens = ids(2, 9)
    with torch.no_grad():
        got = model(input_ids=tokens).logits
    torch.testing.assert_close(got, unlike.program(input_ids=tokens).logits, rtol=0, atol=1e-5)
    assert [s.kv_heads for s in attnopt.capture(saved).sites] == [4, 2]


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm"])
def test_other_models_are_what_they_are_without_attnopt(name: str) -> None:
    model = decoder(name)
    kinds = {type(m).__name__: type(m).__module__ for m in model.modules()}
    assert all(not home.startswith("attnopt") for home in kinds.values())


def test_a_load_that_fails_puts_the_classes_back() -> None:
    from transformers.models.llama import modeling_llama
    from transformers.monkey_patching import get_patch_mapping

    stock = modeling_llama.LlamaAttention
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_act="no such function")
    with pytest.raises(KeyError):
        transformers.LlamaForCausalLM._from_config(config)
    assert modeling_llama.LlamaAttention is stock
    assert get_patch_mapping() == {}


def test_classes_that_take_more_get_what_they_are_given() -> None:
    class Three(torch.nn.Module):
        def __init__(self, config: object, layer_idx: int, more: str, *, last: int = 0) -> None:
            super().__init__()
            self.given = (layer_idx, more, last)

    config = transformers.LlamaConfig()
    assert stand_in(Three)(config, 3, "more", last=1).given == (3, "more", 1)
    assert stand_in(Three)(config, layer_idx=3, more="more").given == (3, "more", 0)
    with pytest.raises(TypeError, match="missing"):
        stand_in(Three)(config)


def test_what_a_user_registers_goes_first() -> None:
    from transformers import monkey_patching
    from transformers.models.llama import modeling_llama

    class Own(modeling_llama.LlamaAttention):
        pass

    monkey_patching.register_patch_mapping({"LlamaAttention": Own})
    try:
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=8)
        )
    finally:
        monkey_patching.clear_patch_mapping()
    assert type(model.model.layers[0].self_attn) is Own
    assert modeling_llama.LlamaAttention is not Own
