"""What a request passes before a route sees it, and how it is refused."""
