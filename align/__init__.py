"""SeRALM: a trainer job and a generator job that meet only through the snapshot store and the sample log."""
