"""vLLM's own offline throughput on a generator's prompts, on the cores that this process has.

``python -m launch.bench.offline --config RUN/config.yaml`` prints tokens a second.
"""

import sys

from align.config import Stages
from align.order import StepOrder, training_data
from align.start import read_arguments
from llm.engine import Engine
from llm.prompts import item_texts, prompt_tokens
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.runtime.logs import run_main


def main() -> None:
    """Generate the texts of every step of the run about the last items of histories."""
    job, _ = read_arguments(__doc__)
    align, llm, stages = job.align, job.llm, Stages(job.run)
    data, model = training_data(job, Prepared.load(stages.data_folder(job.data))), stages.llm_model(job.llm)
    prompts = prompt_tokens(item_texts(data.items, llm.item_text), llm.knowledge.prompt, load_tokenizer(model))
    trainer = align.trainer
    order = StepOrder(data, align.reward_users, job.rec.model.max_length, trainer.batch_size, trainer.seed)
    asked = [
        prompts[task.pair.items[-1] - 1]
        for step in range(trainer.steps)
        for task in order.tasks(step)
        for _ in range(align.objective.samples if task.rewards else 1)
    ]
    engine = Engine(model, llm.engine, max(map(len, prompts)) + llm.knowledge.max_new_tokens)
    sys.stdout.write(f"{engine.offline_rate(asked, llm.knowledge.max_new_tokens)}\n")


if __name__ == "__main__":
    run_main(main)
