"""The Gradio page of `infer ui`."""
