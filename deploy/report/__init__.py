"""`ratchet report`: a run directory as one HTML file. Nothing here imports Ray, torch or vLLM. Runs anywhere."""
