"""A task for real runs of verl on a model made on the spot: byte tokenizer, random Llama, a few prompts, a reward.

Also an agent loop of two turns. verl imports this file by path for the reward, and by name for the agent loop.
"""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info=None, **kwargs) -> float:
    """The share of even bytes: something that a random policy does neither always nor never."""
    data = solution_str.encode()
    return sum(byte % 2 == 0 for byte in data) / max(1, len(data))


def make_model(folder: Path, *, layers: int = 2, tied: bool = True) -> Path:
    """A random Llama with grouped-query attention and a byte tokenizer with a chat template, as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_prompts(path: Path, count: int = 16) -> Path:
    """A parquet file in verl's format."""
    import pandas

    rows = [
        {
            "data_source": "tiny",
            "prompt": [{"role": "user", "content": f"Say something about {i} and {i + 1}."}],
            "ability": "none",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(count)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path


try:
    from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
except ImportError:  # the reward worker loads this file by path, before verl's agent loops can be imported
    AgentLoopBase = object


class TwoTurns(AgentLoopBase):
    """Generates, appends a user turn, generates again on the longer prompt: the second turn hits the prefix cache."""

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> "AgentLoopOutput":
        messages = list(kwargs["raw_prompt"])
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        user = self.tokenizer("<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        share = {**sampling_params, "max_new_tokens": 12}
        first = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=prompt, sampling_params=dict(share)
        )
        between = user["input_ids"]
        second = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=prompt + first.token_ids + between, sampling_params=dict(share)
        )
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=first.token_ids + between + second.token_ids,
            response_mask=[1] * len(first.token_ids) + [0] * len(between) + [1] * len(second.token_ids),
            response_logprobs=first.log_probs + [0.0] * len(between) + second.log_probs,
            num_turns=4,
            metrics={},
            extra_fields={**second.extra_fields, "turn_scores": [], "tool_rewards": []},
        )


class PublishesOnce(AgentLoopBase):
    """One turn; the first of a process publishes a drafter while its request is in flight."""

    published = False

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> "AgentLoopOutput":
        text = self.tokenizer.apply_chat_template(
            list(kwargs["raw_prompt"]), add_generation_prompt=True, tokenize=False
        )
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        turn = asyncio.create_task(
            self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=prompt, sampling_params={**sampling_params, "max_new_tokens": 40}
            )
        )
        if not PublishesOnce.published:
            PublishesOnce.published = True
            await self._publish()
        out = await turn
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=out.token_ids,
            response_mask=[1] * len(out.token_ids),
            response_logprobs=out.log_probs,
            num_turns=2,
            metrics={},
            extra_fields={**out.extra_fields, "turn_scores": [], "tool_rewards": []},
        )

    @staticmethod
    async def _publish() -> None:
        import ray

        server = ray.get_actor("sglang_server_0_0")
        while not (await server.drafter_state.remote())["speculation"]["strategies"]:
            await asyncio.sleep(0.01)  # something has been decoded without it
        folder = Path(await server.publications.remote())
        shutil.copytree(os.environ["TLT_TEST_DRAFTER"], folder / "v1")
        reason = await server.publish_drafter.remote(1)
        assert reason is None, reason
