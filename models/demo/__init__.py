"""The demo: a small image-text model, trained on still frames, learns to tell the direction of motion."""
