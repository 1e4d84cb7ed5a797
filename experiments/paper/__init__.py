"""The paper's tables and figures. Each is a short declaration; one runner runs them all."""
