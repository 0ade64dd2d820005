import io
import random
from dataclasses import asdict, replace
from itertools import islice

import low_rank
import prepare_model
import pytest
import torch
from finetune import IGNORE, Checkpoint, MasterAdamW, Recipe, Sample, finetune, pack, row_loss
from progress import Progress

RECIPE = Recipe(steps=12, row_tokens=48, lr=3e-3, warmup_steps=2)
TWO_STEPS = Recipe(steps=2, row_tokens=768, lr=3e-3, warmup_steps=1)


def tiny_model(vocab_size=64, dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def samples(seed=0):
    """Endless counting sequences of random length: learnable in a few steps."""
    rng = random.Random(seed)
    while True:
        start, length = rng.randrange(20), rng.randrange(4, 30)
        yield Sample([(start + i) % 60 for i in range(length)], prompt_len=2)


def rows():
    return pack(samples(), RECIPE.row_tokens, pad_id=63)


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


class Killed(BaseException):
    pass


def kill_after(steps):
    def on_step(step, loss, tokens):
        if step == steps:
            raise Killed

    return on_step


def test_rows_are_full_and_keep_every_sample():
    wanted = list(islice(samples(), 50))
    packed = list(pack(wanted, 48, pad_id=63))
    assert {row.input_ids.shape for row in packed} == {(1, 48)}
    trained = sum(int((row.labels != IGNORE).sum()) for row in packed)
    assert trained == sum(len(sample.tokens) - sample.prompt_len for sample in wanted)
    starts = sum(int((row.position_ids == 0).sum()) for row in packed)
    padded_rows = sum(int(row.input_ids[0, -1] == 63) for row in packed)
    assert starts == len(wanted) + padded_rows


def test_labels_are_the_next_tokens_after_the_prompt():
    row = next(pack([Sample([5, 6, 7, 8], 2), Sample([9, 10], 1)], 8, pad_id=0))
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert row.labels.tolist() == [[IGNORE, 7, 8, IGNORE, 10, IGNORE, IGNORE, IGNORE]]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="row_tokens=4"):
        next(pack([Sample([1] * 5, 1)], 4, pad_id=0))


def test_packed_samples_do_not_see_each_other():
    model = tiny_model(dtype=torch.float32)
    left, right = Sample(list(range(10, 22)), 3), Sample(list(range(40, 30, -1)), 2)
    packed = row_loss(model, next(pack([left, right], 40, pad_id=63)))
    alone = [row_loss(model, next(pack([sample], len(sample.tokens), pad_id=63))) for sample in (left, right)]
    n_left, n_right = 9, 8
    expected = (alone[0] * n_left + alone[1] * n_right) / (n_left + n_right)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)


def test_fine_tuning_learns_and_is_deterministic():
    losses = []
    first, second = tiny_model(), tiny_model()
    finetune(first, rows(), RECIPE, on_step=lambda step, loss, tokens: losses.append(loss))
    finetune(second, rows(), RECIPE)
    assert same_bits(first, second)
    assert len(losses) == RECIPE.steps
    assert losses[-1] < losses[0] - 0.3


def test_masters_keep_what_bf16_rounds_away():
    model = tiny_model()
    optimizer = MasterAdamW(model, RECIPE)
    before = [master.clone() for master in optimizer.masters]
    row_loss(model, next(rows())).backward()
    optimizer.step(lr=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, optimizer.masters, strict=True))
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(optimizer.params, optimizer.masters, strict=True))
    assert all(param.grad is None for param in optimizer.params)


@pytest.mark.parametrize("killed_after", [3, 5, 8, 12])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, killed_after):
    whole, resumed = tiny_model(), tiny_model()
    finetune(whole, rows(), RECIPE)
    checkpoint = Checkpoint(tmp_path / "state", "mark", every=5)
    with pytest.raises(Killed):
        finetune(tiny_model(), rows(), RECIPE, checkpoint=checkpoint, on_step=kill_after(killed_after))
    (tmp_path / "state.4711.tmp").write_bytes(b"torn by the kill")
    steps = []
    finetune(resumed, rows(), RECIPE, checkpoint=checkpoint, on_step=lambda step, *_: steps.append(step))
    assert same_bits(whole, resumed)
    saved = 12 if killed_after == 12 else killed_after // 5 * 5
    assert steps == list(range(saved + 1, RECIPE.steps + 1))
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_another_recipes_checkpoint_is_not_used(tmp_path):
    with pytest.raises(Killed):
        finetune(tiny_model(), rows(), RECIPE, checkpoint=Checkpoint(tmp_path / "s", "a", 2), on_step=kill_after(6))
    steps = []
    other = Checkpoint(tmp_path / "s", "b", 2)
    finetune(tiny_model(), rows(), RECIPE, checkpoint=other, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == 1


def test_learning_rate_warms_up_and_decays():
    recipe = Recipe(steps=101, lr=1.0, warmup_steps=10, final_lr_share=0.1)
    assert recipe.lr_at(0) == pytest.approx(0.1)
    assert recipe.lr_at(10) == pytest.approx(0.91)
    assert recipe.lr_at(100) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random model with the real package's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / prepare_model.BASE_NAME
    prepare_model.save_model(folder, tiny_model(vocab_size=49152), prepare_model.load_base_tokenizer())
    return folder


@pytest.fixture(autouse=True)
def short_replay(monkeypatch):
    monkeypatch.setattr(prepare_model, "REPLAY_PROMPTS", 4)
    monkeypatch.setattr(prepare_model, "REPLAY_TOKENS", 6)


def test_the_saved_tokenizer_is_the_chat_models(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token) == (2, "<|im_start|>")
    chat = [{"role": "user", "content": "What is 12 + 34?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1234")) == ["1", "2", "3", "4"]
    sample = next(prepare_model.draw_samples(tokenizer, seed=0))
    answer = tokenizer.decode(sample.tokens[sample.prompt_len :])
    assert answer.startswith("Column 1: ") and answer.endswith("<|im_end|>")


def test_replayed_answers_are_kept_for_a_resumed_run(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    path = base.with_name(".replay.json")
    replay = prepare_model.sample_replay(model, tokenizer, 0, path)
    assert len(replay) == prepare_model.REPLAY_PROMPTS
    assert tokenizer.decode(replay[0].tokens[: replay[0].prompt_len]).endswith("<|im_start|>assistant\n")
    assert prepare_model.sample_replay(None, tokenizer, 0, path) == replay
    path.unlink()


@pytest.fixture(scope="module")
def update(base, tmp_path_factory):
    """An update of the tiny model, trained for two steps by the script's own loop."""
    path = tmp_path_factory.mktemp("update") / "update.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_model, "REPLAY_PROMPTS", 4)
        patch.setattr(prepare_model, "REPLAY_TOKENS", 6)
        prepare_model.train_update(path, TWO_STEPS, 3, base=base, checkpoint_every=1)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "the training left something"
    return path


def test_a_finished_model_is_reused_until_the_update_is_another(base, update, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = tmp_path / "models"
    models.mkdir()
    (models / prepare_model.BASE_NAME).symlink_to(base)
    out, own = models / "reasoner", tmp_path / "own.safetensors"
    own.write_bytes(update.read_bytes())
    prepare_model.prepare(out, own, base=base)
    made = (out / "model.safetensors").stat().st_mtime_ns
    prepare_model.prepare(out, own, base=base)
    assert "already made" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    assert sorted(path.name for path in models.iterdir()) == ["reasoner", prepare_model.BASE_NAME]
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template

    prepare_model.train_update(own, replace(TWO_STEPS, steps=3), 3, base=base, checkpoint_every=1)
    prepare_model.prepare(out, own, base=base)
    assert (out / "model.safetensors").stat().st_mtime_ns != made


def test_the_same_recipe_makes_the_same_update(base, update, tmp_path):
    again = tmp_path / "again.safetensors"
    prepare_model.train_update(again, TWO_STEPS, 3, base=base, checkpoint_every=1)
    (first, *figures), (second, *same) = low_rank.load(update), low_rank.load(again)
    assert figures == same and first.keys() == second.keys()
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def test_an_update_of_another_base_is_refused(base, update, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    prepare_model.save_model(tmp_path / "other", model, AutoTokenizer.from_pretrained(base))
    with pytest.raises(low_rank.UpdateError, match=r"layers\.1\.mlp\.up_proj is off by .*another base"):
        prepare_model.prepare(tmp_path / "out", update, base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_the_shipped_update_is_small_and_says_how_it_was_made():
    assert prepare_model.UPDATE.stat().st_size <= 4_000_000
    factors, merged, about = low_rank.load(prepare_model.UPDATE)
    assert factors.keys() == merged.keys() and len(factors) == 7 * 30
    assert about["recipe"] == asdict(prepare_model.RECIPE) | {"rank": prepare_model.RANK, "betas": [0.9, 0.95]}


def test_a_folder_of_somebody_else_is_not_overwritten(base, update):
    foreign = base.with_name("foreign")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"--out=.*foreign"):
        prepare_model.prepare(foreign, update, base=base)
    assert (foreign / "thesis.txt").exists()
    (foreign / "thesis.txt").unlink()
    foreign.rmdir()


def test_one_sample_in_eight_is_replayed():
    solutions, replay = islice(samples(), 21), [Sample([60], 0), Sample([61], 0)]
    mixed = list(prepare_model.mix(solutions, replay))
    assert [mixed[i].tokens for i in (7, 15, 23)] == [[60], [61], [60]]
    assert len(mixed) == 24


def test_progress_prints_lines_when_it_is_not_a_terminal():
    out, times = io.StringIO(), iter([0.0, 1.0, 2.0, 7.0, 8.0])
    progress = Progress("made", 4, out=out, interval_s=5.0, clock=lambda: next(times))
    for step in range(1, 5):
        progress.update(step, units=10, note="loss 1.0")
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1].split()[0] for line in lines] == ["1/4", "3/4", "4/4"]
    assert "5 tokens/s  0:08 elapsed, 0:00 to go" in lines[-1]
