import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import InvalidRequest
from core.folders import folder_digest
from trainer.convert import convert, main, parse_source


def test_a_folder_becomes_a_plain_folder_with_the_same_weights(tiny, tmp_path):
    target = convert({"type": "folder", "path": str(tiny)}, tmp_path / "models" / "made")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, tiny))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(target).chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def test_converting_twice_gives_the_same_digest_and_keeps_what_is_there(tiny, tmp_path):
    source = {"type": "folder", "path": str(tiny)}
    first, second = convert(source, tmp_path / "one"), convert(source, tmp_path / "two")
    assert folder_digest(first) == folder_digest(second)
    (first / "mark").write_text("kept")
    assert (convert(source, first) / "mark").exists()


@pytest.mark.parametrize(
    "source", [{"type": "folder", "path": "/nowhere"}, {"type": "gguf", "path": "/nowhere/x.gguf"}, {"type": "tape"}, {}]
)
def test_a_source_that_cannot_be_read_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(InvalidRequest):
        convert(source, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_safetensors_are_refused(tiny, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save(AutoModelForCausalLM.from_pretrained(tiny).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(InvalidRequest):
        convert({"type": "folder", "path": str(pickled)}, tmp_path / "made")


def test_a_path_is_read_as_gguf_or_folder_and_json_as_it_stands(tmp_path):
    assert parse_source(str(tmp_path)) == {"type": "folder", "path": str(tmp_path)}
    assert parse_source("model.gguf") == {"type": "gguf", "path": "model.gguf"}
    assert parse_source('{"type": "hub", "repo": "a/b", "revision": "c"}')["repo"] == "a/b"
    with pytest.raises(InvalidRequest):
        parse_source("{broken")


def test_a_gguf_file_becomes_a_folder_that_the_library_loads(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    target = convert({"type": "gguf", "path": str(tmp_path / "tiny.gguf")}, tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(target)
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.model.norm.weight.detach().numpy(), weights["output_norm.weight"])
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), weights["blk.0.ffn_up.weight"])
    assert AutoTokenizer.from_pretrained(target)("ab").input_ids


def test_the_program_says_in_one_line_what_went_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainer.convert", "/nowhere.gguf", str(tmp_path / "made")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "/nowhere.gguf" in done.stderr
    assert "Traceback" not in done.stderr
    assert main([]) == 2


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer in float32 with a byte-level tokenizer of a few tokens."""
    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 16),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_rope_dimension_count, 8),
        (writer.add_vocab_size, 6),
    ):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "a", "b", "c", "ab", "d"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd.weight": (6, 16),
        "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (32, 16),
        "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }
    weights = {name: np.sin(np.arange(np.prod(shape), dtype=np.float32) + len(name)).reshape(shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
