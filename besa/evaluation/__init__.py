"""How good a model is: perplexity, and tasks of lm-evaluation-harness."""
