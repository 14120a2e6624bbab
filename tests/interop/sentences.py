"""The sentences whose embeddings are compared."""

TEXTS = [
    "The train from Lyon to Paris was two hours late.",
    "How do I reset my password?",
    "Photosynthesis turns light into chemical energy.",
    "Her second novel won a prize, though few critics had liked the first.",
    "The committee met on Tuesday to vote on the new budget for schools, roads and the harbour.",
    "No.",
]
