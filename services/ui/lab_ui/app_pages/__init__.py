"""The pages as Streamlit scripts: they draw and keep session state, and leave logic to the modules beside app.py."""
