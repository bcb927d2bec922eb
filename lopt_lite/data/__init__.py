"""The data room: JSON Lines to conversations to token ids with labels to batches.

``load.load_dataset`` is the way in; ``dataset`` and ``batches`` are what training works with; ``templates`` also
serves generation, so that a prompt is tokenised as in training.
"""
