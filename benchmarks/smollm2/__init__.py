"""SmolLM2 fine-tuned and calibrated."""
