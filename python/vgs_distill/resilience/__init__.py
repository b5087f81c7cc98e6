"""What keeps a run whole: checkpoints, interruptions, and steps that go wrong."""
