"""What the servers written in torch (AutoDeploy, vLLM) share: an artifact's layers, and rows of new tokens."""
