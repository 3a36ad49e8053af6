"""vLLM's own offline throughput on a generator's prompts.

``python -m launch.bench.offline --config RUN/config.yaml``

No seeds, no log-probs, one call for everything: as fast as this engine goes on these cores. Prints tokens a second.
"""

import sys
import time

from align.config import Stages
from align.order import StepOrder, training_data
from align.start import read_arguments
from llm.engine import Engine
from llm.prompts import item_texts, prompt_tokens
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.runtime.logs import run_main


def main() -> None:
    """Generate the texts of every step of the run, twice, and time the second time."""
    from vllm import SamplingParams

    job, _ = read_arguments(__doc__)
    align, llm, stages = job.align, job.llm, Stages(job.run)
    data, model = training_data(job, Prepared.load(stages.data_folder(job.data))), stages.llm_model(job.llm)
    prompts = prompt_tokens(item_texts(data.items, llm.item_text), llm.knowledge.prompt, load_tokenizer(model))
    trainer = align.trainer
    order = StepOrder(data, align.reward_users, job.rec.model.max_length, trainer.batch_size, trainer.seed)
    tasks = [task for step in range(trainer.steps) for task in order.tasks(step)]
    asked = [
        {"prompt_token_ids": prompts[task.pair.items[-1] - 1]}
        for task in tasks
        for _ in range(align.objective.samples if task.rewards else 1)
    ]
    engine = Engine(model, llm.engine, max(map(len, prompts)) + llm.knowledge.max_new_tokens)
    settings = SamplingParams(temperature=1.0, max_tokens=llm.knowledge.max_new_tokens)
    for _ in range(2):
        engine.llm.reset_prefix_cache()
        begin = time.monotonic()
        outputs = engine.llm.generate(asked, settings, use_tqdm=False)
        seconds = time.monotonic() - begin
    sys.stdout.write(f"{sum(len(output.outputs[0].token_ids) for output in outputs) / seconds}\n")


if __name__ == "__main__":
    run_main(main)
