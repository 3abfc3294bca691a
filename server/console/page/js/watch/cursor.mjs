/** The time that the reader points at; all charts show their values there. Events: "move". */
export class Cursor extends EventTarget {
  time = null;

  /** time: unix seconds; null: the reader points at none. */
  set(time) {
    if (time === this.time) return;
    this.time = time;
    this.dispatchEvent(new Event("move"));
  }
}
