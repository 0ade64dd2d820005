"""Prompts of a warm-up: which files are read, and as what."""

from __future__ import annotations

import json

import pandas
import pytest
import torch

from tlt_verl.config import ConfigError
from tlt_verl.segments import Segment
from tlt_verl.warmup.prompts import read_prompts, split_prompts
from tlt_verl.warmup.responses import whole_samples


class Tokenizer:
    """One token a byte; a chat is its roles and contents."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict) -> dict:
        assert add_generation_prompt and tokenize and return_dict
        return self("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")


CHAT = [{"role": "user", "content": "hi"}]


def test_parquet_as_verl_writes_it(tmp_path):
    path = tmp_path / "prompts.parquet"
    pandas.DataFrame({"data_source": ["x", "x"], "prompt": [CHAT, [{"role": "user", "content": "ho"}]]}).to_parquet(
        path
    )
    assert read_prompts(path, Tokenizer()) == [list(b"<user>hi<assistant>"), list(b"<user>ho<assistant>")]


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ({"prompt": "as it is"}, b"as it is"),
        ({"messages": CHAT}, b"<user>hi<assistant>"),
        ({"prompt": CHAT}, b"<user>hi<assistant>"),
    ],
)
def test_json_lines_with_a_text_or_a_chat(tmp_path, row, tokens):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    assert read_prompts(path, Tokenizer()) == [list(tokens)], "each prompt once"


@pytest.mark.parametrize("text", ['{"question": "x"}\n', '{"prompt": "x"}\n{"other": 1}\n'])
def test_a_file_without_prompts_is_named(tmp_path, text):
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--prompts: got .*wrong.jsonl.*prompt or messages"):
        read_prompts(path, Tokenizer())


def test_held_out_prompts_are_not_trained_on_and_the_split_stays():
    prompts = [[i] for i in range(20)]
    training, held_out = split_prompts(prompts, 5, seed=1)
    assert len(held_out) == 5 and sorted(training + held_out) == prompts
    assert split_prompts(prompts, 5, seed=1) == (training, held_out) != split_prompts(prompts, 5, seed=2)
    with pytest.raises(ConfigError, match="--held-out: got 11, takes at most half of the 20"):
        split_prompts(prompts, 11, seed=1)


def part(request: str, start: int, tokens: list[int]) -> Segment:
    hidden = torch.tensor(tokens).bfloat16()[:, None].expand(-1, 2).contiguous()
    ids, logprobs = torch.tensor(tokens, dtype=torch.int32), torch.zeros(len(tokens), dtype=torch.float16)
    return Segment(0, request, 1, start, 2, False, ids, hidden, logprobs)


def test_responses_are_found_by_their_tokens_and_the_last_one_has_no_hidden_state():
    prompts, responses = [[1, 2], [3, 4]], {1: [5, 6, 7], 0: [8, 9]}
    segments = [part("b", 0, [3, 4]), part("a", 0, [1, 2, 8]), part("b", 2, [5, 6])]
    second, first = whole_samples(prompts, responses, segments)
    assert first.tokens.tolist() == [1, 2, 8, 9] and first.features[:, 0].tolist() == [1, 2, 8, 0]
    assert second.tokens.tolist() == [3, 4, 5, 6, 7] and second.features[:, 0].tolist() == [3, 4, 5, 6, 0]
    assert first.prompt_len == second.prompt_len == 2
    with pytest.raises(RuntimeError, match="nothing of the response to prompt 0"):
        whole_samples(prompts, {0: [8, 8, 8]}, segments)
