"""kvtier chat over checkpoints on disk: what it prints is what stock generation says, also after it was started again."""

from __future__ import annotations

import io

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvtier.engine.template import render_turn
from kvtier.tools import cli

FAMILIES = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, {}),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, dict(head_dim=16)),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, dict(head_dim=16, sliding_window=24)),
    "gemma3": (
        T.Gemma3TextConfig,
        T.Gemma3ForCausalLM,
        dict(
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "0123456789 ?!.,"]
ANSWER_TOKENS = 12


def make_tokenizer(template: str | None = TEMPLATE) -> T.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(TEXT, trainer)
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def small_model(family: str, tokenizer, max_positions: int = 2048):
    """Random weights, loud enough that answers differ."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **extra,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def save(family: str, path, tokenizer) -> None:
    model = small_model(family, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.inference_mode()
def stock_turns(path, tokenizer, turns: list[str]) -> list[str]:
    model = T.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    ids: list[int] = []
    answers = []
    for text in turns:
        ids += render_turn(tokenizer, text, ids)
        cache, out, x = T.DynamicCache(config=model.config), [], torch.tensor([ids])
        while len(out) < ANSWER_TOKENS and tokenizer.eos_token_id not in out:
            out.append(int(model(x, past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
            x = torch.tensor([[out[-1]]])
        ids += out
        answers.append(tokenizer.decode(out, skip_special_tokens=True))
    return answers


def chat(monkeypatch, capsys, text: str, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = cli.main(["chat", *[str(a) for a in argv]])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_stock_generation_across_a_restart(family, tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    save(family, tmp_path / "model", tokenizer)
    turns = [" ".join(TEXT), "what is 42?", "and the dog?"]
    wanted = stock_turns(tmp_path / "model", tokenizer, turns)
    flags = ["--model", tmp_path / "model", "--store", tmp_path / "store", "--max-tokens", ANSWER_TOKENS]
    flags += ["--device-bytes", "384KiB", "--host-bytes", "1MiB"]
    code, first, _ = chat(monkeypatch, capsys, "\n".join([turns[0], "/stats", turns[1], "/quit", "never read"]), *flags)
    assert code == 0
    code, second, told = chat(monkeypatch, capsys, turns[2], *flags)
    assert code == 0 and " 0 tokens known" not in told
    assert first + second == "".join(answer + "\n" for answer in wanted)


def test_commands_go_through_a_whole_conversation(tmp_path, monkeypatch, capsys):
    save("llama", tmp_path / "model", make_tokenizer())
    flags = ["--model", tmp_path / "model", "--store", tmp_path / "store", "--max-tokens", 4, "--session", "a"]
    lines = ["the dog", "/park", "the fox", "/fork", "/rollback 5", "/help", "/nonsense 1", "/rollback 99999", "ok"]
    code, _, told = chat(monkeypatch, capsys, "\n".join(lines), *flags)
    assert code == 0
    assert "'a' is parked" in told and "now in session 'a/1'" in told and "5 tokens known" in told
    assert "unknown command '/nonsense 1'" in told and "error: truncate: num_tokens=99999" in told
    code, _, told = chat(monkeypatch, capsys, "", *flags)
    assert code == 0 and "session 'a': " in told and " 0 tokens known" not in told


def test_rendered_turns_add_up_to_the_whole_template():
    tokenizer = make_tokenizer()
    first = render_turn(tokenizer, "hello", [])
    answer = tokenizer("fox")["input_ids"]
    wanted = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"}]
    wanted = [*wanted, {"role": "user", "content": "more"}]
    whole = tokenizer.apply_chat_template(wanted, tokenize=False, add_generation_prompt=True)
    for said in (answer, [*answer, tokenizer.eos_token_id]):  # stopped by length, or by the model itself
        known = [*first, *said]
        assert tokenizer.decode([*known, *render_turn(tokenizer, "more", known)]) == whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "holds no config.json"),
        (["--model", "MODEL", "--dtype", "int3"], "dtype='int3'"),
        (["--model", "MODEL", "--temperature", "-1"], "temperature=-1.0"),
        (["--model", "MODEL", "--device-bytes", "0"], "device_bytes"),
        (["--model", "MODEL", "--store", "/proc/none/x"], "cannot be written"),
        (["--model", "NO_TOKENIZER"], "no tokenizer"),
        (["--model", "MAMBA"], "'mamba' is not supported"),
        (["--model", "T5"], "T5"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    save("llama", tmp_path / "MODEL", make_tokenizer())
    save("llama", tmp_path / "NO_TOKENIZER", make_tokenizer())
    for file in (tmp_path / "NO_TOKENIZER").glob("token*"):
        file.unlink()
    small = dict(vocab_size=64, hidden_size=32)
    T.MambaForCausalLM(T.MambaConfig(**small, num_hidden_layers=1)).save_pretrained(tmp_path / "MAMBA")
    T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, num_layers=1, d_ff=32)).save_pretrained(
        tmp_path / "T5"
    )
    make_tokenizer().save_pretrained(tmp_path / "MAMBA")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    code, out, err = chat(monkeypatch, capsys, "hello\n", "--store", tmp_path / "store", *argv)
    lines = [line for line in err.splitlines() if line.startswith("kvtier: error: ")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "store").exists()
