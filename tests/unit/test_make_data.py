import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import make_data
from measure import EntropyMeter, sample_responses, summarise
from progress import Progress


class LetterTokenizer:
    """One token a letter; token 0 ends a turn and pads."""

    eos_token_id = pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 30 for letter in text]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(96 + int(token)) for token in tokens if token)

    def apply_chat_template(self, chats, **_):
        rows = [self.encode(chat[0]["content"]) for chat in chats]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


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


def test_summary_counts_up_to_the_first_end():
    tokens = torch.tensor([[1, 2, 0, 0, 0], [1, 0, 3, 0, 0], [4, 5, 6, 7, 8]])
    entropies = torch.tensor([[1.0, 1, 1, 99, 99], [2, 2, 99, 99, 99], [3, 3, 3, 3, 3]])
    summary = summarise(tokens, entropies, LetterTokenizer())
    assert summary.lengths == [3, 2, 5]
    assert summary.cut == 1
    assert summary.texts == ["ab", "a", "defgh"]
    assert summary.mean_entropy == pytest.approx((3 * 1 + 2 * 2 + 5 * 3) / 10)


def test_entropy_is_that_of_the_full_distribution(capsys):
    meter = EntropyMeter(Progress("x", 1))
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert meter(torch.zeros(2, 1), scores) is scores
    assert meter.steps[0].tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0.0], abs=1e-5)


def test_sampling_a_flat_model_has_the_entropy_of_the_vocabulary(capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    chats = [[{"role": "user", "content": text}] for text in ("ab", "abcd", "a")]
    first, second = (
        sample_responses(model, LetterTokenizer(), chats, max_new_tokens=12, seed=3, label="flat") for _ in range(2)
    )
    assert first == second
    assert first.mean_entropy == pytest.approx(torch.tensor(32.0).log().item(), abs=1e-4)
    assert max(first.lengths) <= 12
