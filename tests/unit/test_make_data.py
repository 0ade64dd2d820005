import math

import make_data
import pandas as pd
import pytest
import torch
from chat import replay_requests
from measure import sample_responses, summarise

CHATS = [[{"role": "user", "content": text}] for text in ("ab", "abcd", "a", "xyz", "hello")]


class LetterTokenizer:
    """One token a letter; token 0 ends a turn and pads."""

    eos_token_id = pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 30 for letter in text]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(96 + int(token)) for token in tokens if token)

    def apply_chat_template(self, chat, **_):
        return chat[0]["content"]


def pairs(rows):
    return {tuple(sorted((row["extra_info"]["a"], row["extra_info"]["b"]))) for row in rows}


def test_splits_are_disjoint_and_deterministic():
    train, test = make_data.make_arithmetic("train", 2000, 0), make_data.make_arithmetic("test", 500, 0)
    assert not pairs(train) & pairs(test)
    assert train == make_data.make_arithmetic("train", 2000, 0)
    assert train != make_data.make_arithmetic("train", 2000, 1)


def test_fine_tuning_never_sees_a_test_problem():
    from itertools import islice

    from prepare_model import draw_problems

    test = pairs(make_data.make_arithmetic("test", 500, 0))
    assert not test & {tuple(sorted((str(a), str(b)))) for a, b in islice(draw_problems(seed=0), 2000)}


def test_chat_requests_are_distinct_and_deterministic():
    rows = make_data.make_chat(0)
    requests = [row["prompt"][0]["content"] for row in rows]
    assert len(set(requests)) == len(requests) >= 64
    assert rows == make_data.make_chat(0) != make_data.make_chat(1)
    assert not set(requests) & set(replay_requests(0))


def test_parquet_has_verls_columns(tmp_path):
    path = tmp_path / "new" / "train.parquet"
    rows = make_data.make_arithmetic("train", 20, 0)
    make_data.write_parquet(path, rows)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert frame["prompt"][3][0] == rows[3]["prompt"][0]
    assert frame["reward_model"][3] == rows[3]["reward_model"]
    assert frame["extra_info"][3]["index"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["train.parquet"]


def test_lengths_are_described():
    assert make_data.describe_lengths([1] * 90 + [10] * 10) == (
        "count 100  median 1  p90 2  p99 10  max 10  p99/median 10.0"
    )


def test_share_right_is_the_mean_reward():
    rows = make_data.make_arithmetic("test", 2, 0)
    right = f"Answer: {rows[0]['reward_model']['ground_truth']}"
    assert make_data.share_right(rows, [right, "no"]) == 0.5


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def sample(model, seed=3, limit=12):
    return sample_responses(model, LetterTokenizer(), CHATS, max_new_tokens=limit, seed=seed, label="tiny")


def test_summary_counts_what_was_cut():
    summary = summarise([[1, 2, 0], [1, 0], [4, 5, 6]], [1.0, 2.0, 3.0], LetterTokenizer())
    assert summary.lengths == [3, 2, 3]
    assert summary.cut == 1
    assert summary.texts == ["ab", "a", "def"]
    assert summary.mean_entropy == 2.0


def test_sampling_a_flat_model_has_the_entropy_of_the_vocabulary():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    responses = sample(model, limit=100)
    assert responses == sample(model, limit=100) != sample(model, seed=4, limit=100)
    assert responses.mean_entropy == pytest.approx(math.log(32), abs=1e-4)
    assert len(set(responses.lengths)) > 1, "rows must have left the batch at different steps"


def test_neither_padding_nor_rows_that_leave_change_the_distribution():
    """The entropy that was measured is that of each conversation recomputed alone, without a cache."""
    model, tokenizer = tiny_model(), LetterTokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    responses = sample(model, limit=60)
    assert len(set(responses.lengths)) > 2
    entropies = []
    for chat, text, length in zip(CHATS, responses.texts, responses.lengths, strict=True):
        prompt = tokenizer.encode(chat[0]["content"])
        response = [ord(letter) - 96 for letter in text] + [0] * (length - len(text))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert 0.3 < responses.mean_entropy < 3.0
    assert responses.mean_entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
