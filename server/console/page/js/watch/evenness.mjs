/** Judges how evenly an adapter's experts are used, from the tokens that each worked on. */

const FEWEST_TOKENS = 200;
const EVEN = 0.9;
const HARDLY = 0.1;
/** As the alert PerftExpertsCollapsed has it, of as many experts as a token goes to. */
const COLLAPSED = 0.95;

/** tokens: of each expert; perToken: how many experts each token goes to, null if not known; isOwn: whether the adapter has
 * a router of its own (else the base's decides). Returns {total, busiest (the
 * number of the expert), share (of the busiest, of 1), evenness (the entropy of the shares, 1: all alike), effective (as many
 * evenly used experts have this entropy), kind, text}; kind: "none", "few", "even", "uneven" or "collapsed". */
export function judge(tokens, { perToken = null, isOwn = true } = {}) {
  const total = tokens.reduce((sum, each) => sum + each, 0);
  if (total === 0 || tokens.length === 0) {
    return { total: 0, busiest: null, share: NaN, evenness: NaN, effective: NaN, kind: "none", text: "No token was counted yet." };
  }
  const shares = tokens.map((each) => each / total);
  const busiest = shares.indexOf(Math.max(...shares));
  const entropy = -shares.reduce((sum, share) => sum + (share > 0 ? share * Math.log(share) : 0), 0);
  const evenness = tokens.length > 1 ? entropy / Math.log(tokens.length) : 1;
  const found = { total, busiest, share: shares[busiest], evenness, effective: Math.exp(entropy) };
  return { ...found, ...verdict(found, shares, perToken ?? 1, isOwn) };
}

function verdict({ total, busiest, share, evenness, effective }, shares, perToken, isOwn) {
  const experts = shares.length;
  const used = effective < 9.95 ? effective.toFixed(1) : String(Math.round(effective));
  const asMany = `As if ${used} of ${experts} were used evenly.`;
  if (experts <= perToken) return { kind: "even", text: `Every token goes to all ${experts} experts: there is nothing to choose.` };
  if (total < FEWEST_TOKENS) return { kind: "few", text: `Only ${total} tokens were counted: too few to judge by.` };
  const leading = [...shares].sort((a, b) => b - a).slice(0, perToken).reduce((sum, each) => sum + each, 0);
  if (leading > COLLAPSED) {
    const which = perToken === 1 ? `Expert ${busiest} takes ${percent(share)} of all tokens`
      : `The same ${perToken} experts take ${percent(leading)} of all tokens`;
    const meaning = isOwn ? "the router has collapsed, and the others were trained in vain. Train again with a stronger load-balancing loss."
      : "the base's router hardly uses the others for these requests.";
    return { kind: "collapsed", text: `${which}: ${meaning}` };
  }
  const hardly = shares.filter((each) => each < HARDLY / experts).length;
  if (evenness >= EVEN && hardly === 0) return { kind: "even", text: `All ${experts} experts are used about evenly. ${asMany}` };
  const idle = hardly ? ` ${hardly} ${hardly === 1 ? "is" : "are"} hardly used.` : "";
  return { kind: "uneven", text: `Some experts do much more than others, which is common and no fault by itself.${idle} ${asMany}` };
}

function percent(share) {
  return `${Math.round(share * 100)} %`;
}
