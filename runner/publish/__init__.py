"""Use and publish a tuned model: chat, export, push."""
