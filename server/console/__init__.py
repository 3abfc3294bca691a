"""The console: one page that shows what the server does and lets its reader do what the key may."""
