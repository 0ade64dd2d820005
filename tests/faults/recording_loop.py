"""An agent loop of one turn that writes down the tokens of each response, and leaves the device idle for a while."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput


class Recording(AgentLoopBase):
    """Appends a line of JSON to $TLT_TEST_TOKENS for each response; then waits as long as $TLT_TEST_TOOL says."""

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        text = self.tokenizer.apply_chat_template(
            list(kwargs["raw_prompt"]), add_generation_prompt=True, tokenize=False
        )
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        out = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=prompt, sampling_params=dict(sampling_params)
        )
        with open(os.environ["TLT_TEST_TOKENS"], "a") as file:
            file.write(json.dumps({"prompt": prompt, "response": list(out.token_ids)}) + "\n")
        await asyncio.sleep(float(Path(os.environ["TLT_TEST_TOOL"]).read_text()))
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=out.token_ids,
            response_mask=[1] * len(out.token_ids),
            response_logprobs=out.log_probs,
            num_turns=2,
            metrics={},
            extra_fields={**out.extra_fields, "turn_scores": [], "tool_rewards": []},
        )
