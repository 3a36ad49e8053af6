"""SeRALM's main job, stage by stage, and the studies that are made of several."""
