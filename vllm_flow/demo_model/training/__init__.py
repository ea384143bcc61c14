"""How the demo model was trained; needed only to train it again, never to use it."""
