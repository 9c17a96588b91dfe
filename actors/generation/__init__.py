"""What writes responses: the engine, its weights, the generator. Runs in each generator."""
