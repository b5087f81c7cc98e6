"""What a run will take, before it takes it: memory on every GPU, and operations of a step."""
