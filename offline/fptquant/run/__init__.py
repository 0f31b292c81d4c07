"""One run: the job, its stages, the state that it continues from, the checkpoint that it writes."""
