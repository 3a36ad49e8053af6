"""The study of "The Elephant in the Room": what behaviour-tuned item vectors are worth to plain recommenders."""
