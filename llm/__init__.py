"""Language models: tokenizer, small LMs on behaviour histories, prompts, text encoders, generation with vLLM."""
