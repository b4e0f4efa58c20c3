"""How fast: training steps, generation, preparation, seconds to a loss."""
