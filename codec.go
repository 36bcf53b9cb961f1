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

// This file has the two codecs, Raw, and the detection of the format of a received payload.

// A Codec encodes values as payloads, and decodes payloads into values. Its methods must be safe for concurrent use.
//
// Marshal returns the payload for v. Unmarshal decodes data into the value that v points to.
//
// ContentType returns the MIME type of the codec's payloads, which must differ from those of [MsgPack] and [JSON]. A message has
// the type in the header Content-Type, unless the codec is MsgPack or JSON, which receivers detect by the first byte of the
// payload.
type Codec interface {
	Marshal(v any) ([]byte, error)
	Unmarshal(data []byte, v any) error
	ContentType() string
}

// MsgPack and JSON are the codecs that every service accepts, whichever of them it sends with.
//
// JSON uses encoding/json. MsgPack, the default, is smaller and faster, and follows the rules of encoding/json: a value arrives
// as it would in JSON, or the call fails. The exceptions are listed below. MsgPack takes the names and options of fields from
// the `json` struct tag. If a message has a value that MessagePack would not carry faithfully, the whole message is sent as
// JSON:
//
//	Go type                                                  sent as
//	bool, numbers, string, struct, slice, array, map         MessagePack
//	[]byte, [n]byte                                          MessagePack, as binary data
//	time.Time                                                MessagePack, as a timestamp
//	a struct with MarshalBinary and UnmarshalBinary, no      MessagePack, as binary data
//	  embedded fields, and no other methods for encoding
//	a type with methods for JSON or text (MarshalJSON,       JSON
//	  UnmarshalText, ...), or for MessagePack
//	a struct with the options omitzero or string; with       JSON
//	  omitempty on a struct, an interface or a type with
//	  IsZero; with msgpack tags; with names of other
//	  characters than letters, digits and _ - . ; with an
//	  embedded pointer, or an embedded struct with a tag
//	a type that contains one of these                        JSON
//	any                                                      as its value
//	a value nested deeper than 128 levels                    JSON
//
// MsgPack.Unmarshal decodes MessagePack and JSON. It decodes a payload of a single digit as MessagePack, although the receiver of
// a message takes such a payload for JSON. A value that it decodes into an any becomes nil, a bool, a string, an int64 (or a
// uint64 if it is too large), a float64, a []byte, a [time.Time], a []any or a map[string]any. If the message was sent as JSON,
// the value is as encoding/json decodes it: numbers are float64, and []byte and time.Time are strings. A service answers a JSON
// request in JSON.
//
// MessagePack carries some values that JSON can't: NaN, infinities, strings that are not valid UTF-8, and maps whose keys are
// floats or booleans. There are further differences. A time keeps its instant but not its zone. A float32 that is decoded into a
// float64 keeps its exact value. An any is replaced, whatever it holds. An array must have the length of its target. Some
// conversions that JSON allows fail, such as that of a whole float64 to an integer. Binary data, also from a []byte, is passed to
// the method UnmarshalBinary or UnmarshalText of a target that has one. A type that is sent by MarshalBinary arrives as that
// method has written it. For such a type, aegis registers an encoder with msgpack v5. Other encoders that a program registers
// there are not supported.
//
// MsgPack.Unmarshal fails if the payload ends in the middle of a value, has bytes left over, is nested deeper than 128 levels,
// or declares more elements than it has bytes. Therefore decoding allocates no more than a small multiple of the size of the
// payload times the size of the largest element type in the target. It also fails if a value does not fit its target, for
// example a number that is out of range, an array instead of a struct, or binary data instead of a string. The error names the
// field and the value.
var (
	MsgPack Codec = msgpackCodec{}
	JSON    Codec = jsonCodec{}
)

type jsonCodec struct{}

func (jsonCodec) ContentType() string { return "application/json" }

func (jsonCodec) Marshal(v any) ([]byte, error) { return json.Marshal(v) }

func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// panicToError, when deferred, turns a panic of a method of the user's type into an error.
func panicToError(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic while encoding or decoding: %v", p)
	}
}

type msgpackCodec struct{}

func (msgpackCodec) ContentType() string { return "application/msgpack" }

func (msgpackCodec) Marshal(v any) ([]byte, error) {
	out, err := marshal(MsgPack, v)
	return out.data, err
}

func (msgpackCodec) Unmarshal(data []byte, v any) (err error) {
	defer panicToError(&err)
	if len(data) > 1 && data[0] < 0x80 { // JSON, see sniff; but here, a single digit is MessagePack
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

// marshal encodes v, or what v points to, with c, or in JSON if c is MsgPack and MessagePack does not carry the value. The
// payload of a Raw keeps its format.
func marshal(c Codec, v any) (out Raw, err error) {
	defer panicToError(&err)
	out.codec = c
	if raw, ok := v.(Raw); ok {
		v = new(raw)
	}
	switch raw, ok := v.(*Raw); {
	case ok && raw != nil:
		out = Raw{raw.data, cmp.Or(raw.codec, c)}
	case c == MsgPack && !needsJSON(reflect.ValueOf(v), 0):
		out.data, err = pack(v)
	case c == MsgPack:
		out.codec = JSON
		out.data, err = json.Marshal(v)
	default:
		out.data, err = c.Marshal(v)
	}
	// Receivers take a single digit for JSON; those before version 0.2 took it for MessagePack.
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
	p := packers.Get().(*packer) // not returned to the pool if a method of the user's type panics
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
	p.enc.SetSortMapKeys(true) // so that equal maps of the most common types have equal encodings
	return p
}}

// A Raw is a payload in any format that is not decoded yet. Each type parameter of [Call], [Handle], [Publish], [Subscribe],
// [SendCommand] and [HandleCommand] can be Raw, for example to subscribe to events of several types, or to pass on a payload. A
// Raw that is sent keeps its format. The zero Raw is an empty payload.
type Raw struct {
	data  []byte
	codec Codec // nil in the zero Raw
}

// Decode decodes the payload into the value that v points to, by the rules of the codec of the payload; see [MsgPack] and [JSON].
//
// Errors:
//   - [ErrInvalid] if the payload is empty, if it does not hold a value of that type, or if the service does not support its
//     content type
func (r Raw) Decode(v any) error {
	if err := decodePayload(r.codec, r.data, v); err != nil {
		return newError(ErrInvalid, "the payload is not %v", err)
	}
	return nil
}

// MarshalJSON returns the payload if it is JSON. It implements [json.Marshaler].
//
// Errors:
//   - an error that is not an *Error if the payload is not JSON, because it can't be a part of a JSON value
func (r Raw) MarshalJSON() ([]byte, error) {
	if r.codec != JSON {
		return nil, errors.New("an aegis.Raw that isn't JSON can't be a part of another value: decode it first, or send it by itself")
	}
	return r.data, nil
}

// UnmarshalJSON sets r to a copy of data, which must be JSON. It implements [json.Unmarshaler], and always returns nil.
func (r *Raw) UnmarshalJSON(data []byte) error {
	*r = Raw{bytes.Clone(data), JSON}
	return nil
}

// decodePayload decodes a received payload, with the codec c that codecFor has returned, into what v points to. Its error
// begins with the name of that type.
func decodePayload(c Codec, data []byte, v any) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", strings.TrimPrefix(fmt.Sprintf("%T", v), "*"), err)
		}
	}()
	defer panicToError(&err)
	if raw, ok := v.(*Raw); ok && raw != nil {
		*raw = Raw{data, c}
		return nil
	}
	if len(data) == 0 {
		return errors.New("it is empty: send at least {}")
	}
	// Marks of UTF-8 and UTF-16. In MessagePack, bytes would be left over after them.
	for _, mark := range []string{"\xef\xbb\xbf", "\xfe\xff", "\xff\xfe"} {
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
