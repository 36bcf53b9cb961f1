package aegis

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"
)

// This file has the two codecs, Raw, and the detection of a received payload's format.

// A Codec encodes values as payloads and decodes payloads. Its methods must be safe for concurrent use.
//
// ContentType returns the MIME type of the codec's payloads, which must differ from those of [MsgPack] and [JSON]. A message has
// it in the header Content-Type, unless receivers can detect the format from the first byte of the payload.
type Codec interface {
	Marshal(v any) ([]byte, error)
	Unmarshal(data []byte, v any) error
	ContentType() string
}

// The codecs that every service understands, whichever it uses to send.
//
// JSON is encoding/json. MsgPack, the default, is smaller and faster, and follows the rules of encoding/json: what is sent arrives
// as it would in JSON, or there is an error. It takes the names and options of fields from the `json` struct tag.
//
//	Go type                                                  sent as
//	bool, numbers, string, struct, slice, array, map         MessagePack
//	[]byte, [n]byte                                          MessagePack, as binary data
//	time.Time                                                MessagePack, as a timestamp: the instant, without its zone
//	a struct with MarshalBinary and UnmarshalBinary, with    MessagePack, as binary data
//	  no other method for a format, and nothing embedded
//	a type with methods for JSON or text (MarshalJSON,       JSON
//	  UnmarshalText, ...), or for MessagePack
//	a struct with the options omitzero or string, with an    JSON
//	  omitempty that msgpack v5 reads differently, with
//	  msgpack tags or odd names, or with embedded pointers
//	  or embedded structs that have a name of their own
//	a type that contains one of these                        JSON
//	any                                                      what its value needs
//	a value nested deeper than 128 levels                    JSON
//
// Encoders that a program registers with msgpack v5 are not supported. Unmarshal of MsgPack decodes both. A value in an any arrives as nil, a bool, a string, an int64 (a uint64 above its range), a
// float64, a []byte, a [time.Time], a []any or a map[string]any. If it is sent as JSON, every number is a float64. A service
// answers a request in JSON if that was sent as JSON.
//
// MessagePack carries some values that JSON can't: NaN, infinities, strings that are not valid UTF-8, and maps whose keys are
// floats or booleans. What else differs: a time keeps its instant but not its zone; the names of fields have to match exactly; an
// array has to have the length of the target; and a float32 that arrives as a float64 keeps its exact value.
//
// Unmarshal of MsgPack fails if the payload ends in the middle of a value, has bytes left over, is nested deeper than 128 levels,
// or declares more elements than it has bytes. Therefore decoding allocates at most a small multiple of the size of the payload
// times the size of the largest element of the target type. It also fails if a value does not fit its target: a number that is
// out of range, an array instead of a struct, binary data instead of a string. The error names the field and the value.
var (
	MsgPack Codec = msgpackCodec{}
	JSON    Codec = jsonCodec{}
)

type jsonCodec struct{}

func (jsonCodec) ContentType() string { return "application/json" }

func (jsonCodec) Marshal(v any) ([]byte, error) { return json.Marshal(v) }

func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// recoverTo is deferred. It turns a panic of a method of the user's type into an error.
func recoverTo(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic: %v", p)
	}
}

type msgpackCodec struct{}

func (msgpackCodec) ContentType() string { return "application/msgpack" }

func (msgpackCodec) Marshal(v any) ([]byte, error) {
	out, err := marshal(MsgPack, v)
	return out.data, err
}

func (msgpackCodec) Unmarshal(data []byte, v any) (err error) {
	defer recoverTo(&err)
	if len(data) > 1 && data[0] < 0x80 { // see sniff; a single byte is MessagePack here
		return json.Unmarshal(data, v)
	}
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return &json.InvalidUnmarshalError{Type: reflect.TypeOf(v)}
	}
	rest, err := skip(data, 0)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes left over after the value", len(rest))
	}
	if err == nil {
		_, err = unpack(data, target.Elem(), shapeOf(target.Type().Elem()))
	}
	if err != nil {
		return fmt.Errorf("msgpack: %w", err)
	}
	return nil
}

// marshal encodes what v is, or points to, with c, or in JSON if c is MsgPack but does not carry the value. If it is a Raw, its
// payload keeps its format.
func marshal(c Codec, v any) (out Raw, err error) {
	defer recoverTo(&err)
	out.codec = c
	switch raw, ok := v.(*Raw); {
	case ok:
		out = Raw{raw.data, cmp.Or(raw.codec, c)}
	case c == MsgPack && !needsJSON(reflect.ValueOf(v), 0):
		out.data, err = pack(v)
	case c == MsgPack:
		out.codec = JSON
		out.data, err = json.Marshal(v)
	default:
		out.data, err = c.Marshal(v)
	}
	// Receivers take a single digit for JSON, but versions before 0.2 for MessagePack.
	switch digit := len(out.data) == 1 && isDigit(out.data[0]); {
	case digit && out.codec == MsgPack:
		out.data = []byte{0xd0, out.data[0]} // the same integer in two bytes
	case digit && out.codec == JSON:
		out.data = []byte{out.data[0], ' '}
	}
	return out, err
}

// pack encodes v in MessagePack.
func pack(v any) ([]byte, error) {
	p := packers.Get().(*packer) // is lost if a method of the user's type panics
	p.buf.Reset()
	p.enc.ResetWriter(&p.buf) // Reset would also clear the struct tag and the flags
	err := p.enc.Encode(v)
	data := bytes.Clone(p.buf.Bytes())
	if p.buf.Cap() <= 64<<10 {
		packers.Put(p)
	}
	return data, err
}

type packer struct {
	buf bytes.Buffer
	enc *msgpack.Encoder
}

var packers = sync.Pool{New: func() any {
	p := &packer{}
	p.enc = msgpack.NewEncoder(&p.buf)
	p.enc.SetCustomStructTag("json")
	p.enc.UseCompactInts(true)
	p.enc.SetSortMapKeys(true) // so that equal values of the most common types of maps have equal encodings
	return p
}}

// Raw is a payload that is not decoded yet, whatever its format. Each type parameter of [Call], [Handle], [Publish], [Subscribe],
// [SendCommand] and [HandleCommand] can be Raw: for a subscription to events of several types, for example, or to pass a payload
// on. A Raw that is sent keeps its format. The zero Raw is an empty payload.
type Raw struct {
	data  []byte
	codec Codec // nil in the zero Raw
}

// Decode decodes the payload into what v points to, by the rules of [MsgPack] and [JSON]. It fails with [ErrInvalid] if the payload
// is empty, is no value of that type, or has a content type that the service does not support.
func (r Raw) Decode(v any) error {
	if err := decodePayload(r.codec, r.data, v); err != nil {
		return newError(ErrInvalid, "the payload is not %v", err)
	}
	return nil
}

// MarshalJSON returns the payload if it is JSON. Otherwise it fails, because MessagePack can't be a part of JSON.
func (r Raw) MarshalJSON() ([]byte, error) {
	if r.codec != JSON {
		return nil, errors.New("an aegis.Raw that is not JSON is a part of another value: decode it first, or send it alone")
	}
	return r.data, nil
}

// UnmarshalJSON makes r the payload data, which is JSON.
func (r *Raw) UnmarshalJSON(data []byte) error {
	*r = Raw{bytes.Clone(data), JSON}
	return nil
}

// decodePayload decodes a received payload, with the codec that codecFor has returned, into what v points to. Its error begins with
// the name of that type.
func decodePayload(c Codec, data []byte, v any) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", strings.TrimPrefix(fmt.Sprintf("%T", v), "*"), err)
		}
	}()
	defer recoverTo(&err)
	if raw, ok := v.(*Raw); ok && raw != nil {
		*raw = Raw{data, c}
		return nil
	}
	if len(data) == 0 {
		return errors.New("it is empty: send at least {}")
	}
	for _, mark := range []string{"\xef\xbb\xbf", "\xfe\xff", "\xff\xfe"} { // UTF-8 and UTF-16; no MessagePack begins with these
		if bytes.HasPrefix(data, []byte(mark)) && (c == MsgPack || c == JSON) {
			return errors.New("it begins with a byte order mark: send JSON in UTF-8 without one")
		}
	}
	return c.Unmarshal(data, v)
}

// codecFor returns the codec of a received payload: by its content type if the header has one, else by its first byte.
func codecFor(h nats.Header, data []byte, own Codec) Codec {
	label := h.Get(headerContentType)
	if label == "" {
		return cmp.Or(sniff(data), own)
	}
	mime, _, _ := strings.Cut(label, ";")
	for _, c := range [...]Codec{own, MsgPack, JSON} {
		if strings.EqualFold(strings.TrimSpace(mime), c.ContentType()) {
			return c
		}
	}
	return unsupported{own, label}
}

// unsupported stands for the codec of a content type that the service does not support. Only a Raw can hold such a payload.
type unsupported struct {
	Codec // the service's own
	label string
}

func (u unsupported) ContentType() string { return u.label }

func (u unsupported) Unmarshal([]byte, any) error {
	return fmt.Errorf("the content type %q is not supported: send %s, %s or %s",
		u.label, MsgPack.ContentType(), JSON.ContentType(), u.Codec.ContentType())
}

// labelOf returns the content type of the payloads of c, or "" if receivers detect it or c is nil.
func labelOf(c Codec) string {
	if c == nil || c == MsgPack || c == JSON {
		return ""
	}
	return c.ContentType()
}

// sniff detects MessagePack or JSON by the first byte. It returns nil if the payload is empty. JSON begins with an ASCII
// character. A MessagePack value that begins with a byte below 0x80 is an integer of that one byte. If it is a digit, it is taken
// for JSON, because aegis sends such an integer in two bytes.
func sniff(data []byte) Codec {
	switch {
	case len(data) == 0:
		return nil
	case data[0] >= 0x80, len(data) == 1 && !isDigit(data[0]):
		return MsgPack
	}
	return JSON
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
