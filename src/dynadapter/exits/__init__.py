"""Early exits: heads, policies, temperatures, token merging, and the network that routes each sample."""
